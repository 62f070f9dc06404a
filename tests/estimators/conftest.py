"""A policy whose completions can be enumerated, and an update of it, shared by the tests of this folder."""

from __future__ import annotations

import pytest
from helpers.cross_fitting import RowSlopes, row_slopes
from helpers.world import PROMPTS, VOCAB, Update, World, make_update, make_world


@pytest.fixture(scope="module")
def world() -> World:
    result = make_world(4, PROMPTS, VOCAB, 4, 1.0)
    lengths = result.space.batch.completion_mask.sum(-1)
    by_prompt = [float((result.probabilities * lengths)[result.space.batch.group == k].sum() * 3) for k in range(3)]
    assert len(lengths.unique()) == 4
    assert max(by_prompt) - min(by_prompt) > 1
    return result


@pytest.fixture(scope="module")
def update(world: World) -> Update:
    return make_update(world)


@pytest.fixture(scope="module")
def slopes(world: World) -> RowSlopes:
    return row_slopes(world)
