"""One forward whose rows move along directions of their own, against one JVP for each direction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.tolerances import assert_within, rounding_bound
from torch import Tensor
from torch.func import jvp
from torch.nn import functional as F

from fx_influence.core.tree import Direction, DirectionDifference
from fx_influence.policy.modes.tangents_by_group import GroupedTangents, grouped_jvp
from fx_influence.types import Params

ROWS, LENGTH, HEADS, SIZE = 3, 4, 2, 5
GROUPS = torch.tensor([0, 1, 0])
"""Group of each row."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


PARAMS: Params = {"w": draw(HEADS * SIZE, SIZE), "norm": draw(SIZE, seed=1), "shift": draw(SIZE, seed=2)}
INPUT = draw(ROWS, LENGTH, SIZE, seed=3)


def by_head(p: Params) -> Tensor:
    """Scale each head as Qwen3's norms do, (b, L, heads, d), and multiply by a weight once more."""
    heads = F.linear(INPUT, p["w"]).view(ROWS, LENGTH, HEADS, SIZE)
    return F.linear(p["norm"] * heads.tanh() + p["shift"], p["w"]).flatten(2)


def after_transposing(p: Params) -> Tensor:
    """Scale each head with the heads before the positions, (b, heads, L, d)."""
    heads = F.linear(INPUT, p["w"]).view(ROWS, LENGTH, HEADS, SIZE).transpose(1, 2)
    moved = F.layer_norm(p["norm"] * heads.tanh(), (SIZE,), p["norm"], p["shift"])
    return F.linear(moved, p["w"]).transpose(1, 2).flatten(2)


def tangents(tokens: dict[int, Tensor]) -> tuple[list[Params], GroupedTangents]:
    """Return each group's direction, total and total - left out / 2, and all of them for the groups' tokens."""
    total, left_out = ({name: draw(*p.shape, seed=s) for name, p in PARAMS.items()} for s in (7, 8))
    without = {name: x - 0.5 * left_out[name] for name, x in total.items()}
    difference = DirectionDifference(Direction(1.0, total), Direction(0.5, left_out))
    return [without, total], GroupedTangents([difference, DirectionDifference(Direction(1.0, total))], tokens)


@pytest.mark.parametrize("f", [by_head, after_transposing], ids=["b L heads d", "b heads L d"])
def test_every_row_moves_along_its_groups_direction(f: Callable[[Params], Tensor]) -> None:
    rows = torch.arange(ROWS).repeat_interleave(LENGTH)
    directions, grouped = tangents({k: (GROUPS[rows] == k).nonzero().flatten() for k in range(2)})
    value, derivative = grouped_jvp(f, PARAMS, grouped, (ROWS, LENGTH))
    assert torch.equal(value, f(PARAMS))
    for row, k in enumerate(GROUPS.tolist()):
        expected = jvp(f, (PARAMS,), (directions[k],))[1][row]
        assert_within(derivative[row], expected, rounding_bound(torch.float64, LENGTH * HEADS * SIZE, expected))


def test_values_that_mix_groups_are_refused() -> None:
    """Tokens of two groups within a row cannot be told apart where heads come before positions."""
    first = torch.arange(ROWS * LENGTH) % 2 == 0
    _, grouped = tangents({0: first.nonzero().flatten(), 1: (~first).nonzero().flatten()})
    with pytest.raises(NotImplementedError, match="or rows of one group each"):
        grouped_jvp(after_transposing, PARAMS, grouped, (ROWS, LENGTH))
