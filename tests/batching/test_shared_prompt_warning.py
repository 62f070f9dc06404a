"""Warning where rows of E share prompts without a group, so that error bars take them for independent draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, add_padding, make_apply, random_adamw_state, random_batch, random_direction

import fx_influence as fx
from fx_influence.batching.prompts import prompt_index
from fx_influence.types import Batch

PROMPTS = ((1, 2), (3,), (1, 2), (2,), (3,))
"""Prompts of five rows; rows 0 and 2 share one, and rows 1 and 4."""

MESSAGE = r"batch_e\.group is None and 5 rows have 3 distinct prompts; .* pass batch_e\._replace\(group="


def batch_of(prompts: tuple[tuple[int, ...], ...], group: torch.Tensor | None = None, width: int = 6) -> Batch:
    """Return rows of these prompts with three completion tokens each, no two rows with the same."""
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    lengths = torch.tensor([len(prompt) for prompt in prompts]).unsqueeze(1)
    for k, prompt in enumerate(prompts):
        ids[k, : len(prompt) + 3] = torch.tensor([*prompt, k, (k + 1) % 5, 4])
    column = torch.arange(width)
    return Batch(ids, column < lengths + 3, (column >= lengths) & (column < lengths + 3), group=group)


def shifted_right(batch: Batch) -> Batch:
    """Return the same rollouts with their padding on the left."""
    gap = batch.input_ids.shape[1] - batch.attention_mask.sum(1)
    rows = zip(batch.input_ids, batch.attention_mask, batch.completion_mask, gap.tolist(), strict=True)
    rolled = [[x.roll(k) for x in fields] for *fields, k in rows]
    ids, attention_mask, completion_mask = (torch.stack(field) for field in zip(*rolled, strict=True))
    return Batch(ids, attention_mask, completion_mask, group=batch.group)


class Case:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.apply, self.params = make_apply(TinyPolicy(5, 6, 1, 2, 8))
        self.batch_u = random_batch(generator, 3, 6, 5)
        self.state = random_adamw_state(generator, self.params)
        self.direction = random_direction(generator, self.params)

    def influence(self, batch_e: Batch, **options: Any) -> fx.Influence:
        return fx.influence(self.params, self.batch_u, batch_e, self.state, apply=self.apply, **options)

    def snis(self, batch_e: Batch) -> fx.SnisDelta:
        return fx.snis_delta(self.params, self.direction, 0.1, batch_e, apply=self.apply)

    def sweep(self, batch_e: Batch) -> object:
        return fx.snis_sweep(self.params, batch_e, apply=self.apply)


@pytest.mark.parametrize("measure", [Case.influence, Case.snis, Case.sweep])
@pytest.mark.parametrize("padded", [lambda b: b, shifted_right, lambda b: add_padding(b, 1, 2)])
def test_shared_prompts_warn_without_group(
    measure: Callable[[Case, Batch], object], padded: Callable[[Batch], Batch]
) -> None:
    with pytest.warns(UserWarning, match=MESSAGE):
        measure(Case(), padded(batch_of(PROMPTS)))


@pytest.mark.parametrize("measure", [Case.influence, Case.snis, Case.sweep])
def test_shared_prompts_do_not_warn_when_unambiguous(measure: Callable[[Case, Batch], object]) -> None:
    case = Case()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(case, batch_of(PROMPTS, group=torch.tensor([0, 1, 0, 2, 1])))
        measure(case, batch_of(PROMPTS, group=torch.arange(5)))
        measure(case, batch_of(((1, 2), (3,), (1,), (2,), (2, 1))))


def test_shared_prompts_do_not_warn_without_stderr() -> None:
    case = Case()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.influence(batch_of(PROMPTS), stderr=False)
        fx.jvp_delta(case.params, case.direction, batch_of(PROMPTS), apply=case.apply)


def test_shared_prompts_warning_shows_caller_line() -> None:
    with pytest.warns(UserWarning, match="distinct prompts") as caught:
        Case().influence(batch_of(PROMPTS))
    assert caught[0].filename == __file__


def test_prompt_index_ignores_padding_and_completions() -> None:
    batch = batch_of(PROMPTS)
    for padded_batch in (batch, shifted_right(batch), add_padding(batch, 2, 1)):
        numbers = prompt_index(padded_batch).tolist()
        assert [numbers.index(x) for x in numbers] == [0, 1, 0, 3, 1]


def test_prompt_index_differs_when_completion_is_missing() -> None:
    """The prompt of a row without a completion is all that is attended to, and no prefix of another row counts."""
    batch = batch_of(((1, 2), (1, 2), (1, 2)))
    without_completion = batch._replace(completion_mask=batch.completion_mask & (torch.arange(3) != 1).unsqueeze(1))
    numbers = prompt_index(without_completion).tolist()
    assert numbers[0] == numbers[2] != numbers[1]
