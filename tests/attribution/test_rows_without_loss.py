"""Rows of U whose coefficients are all 0, as GRPO has them where the completions of a prompt all earn the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, assert_close, make_apply, random_adamw_state, random_batch
from helpers.present import present
from torch import Tensor

import fx_influence as fx
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.testing import reference
from fx_influence.testing.influence import cross_fitted

ROWS, WIDTH, VOCAB, MARKER = 12, 7, 5, 4
SILENT = {"some prompts": [0, 3, 6, 9, 2], "all prompts": list(range(ROWS)), "all but one row": list(range(1, ROWS))}


class Inputs:
    """A tiny policy, its AdamW, a batch of 6 prompts in which some rows have no loss, and a fresh E."""

    def __init__(self, silent: list[int]) -> None:
        generator = torch.Generator().manual_seed(3)
        self.apply, self.params = make_apply(TinyPolicy(VOCAB, 6, 1, 2, WIDTH, seed=2))
        self.state = random_adamw_state(generator, self.params)
        batch = random_batch(generator, ROWS, WIDTH, VOCAB, min_len=2)._replace(group=torch.arange(ROWS) % 6)
        self.silent = torch.tensor(silent)
        # Coefficients outside the completion are no loss.
        coefficients = torch.where(batch.completion_mask, present(batch.coefficients), torch.nan)
        coefficients[self.silent] = 9.0 * (~batch.completion_mask[self.silent]).double()
        self.u = batch._replace(coefficients=coefficients)
        fresh = random_batch(generator, ROWS, WIDTH, VOCAB, min_len=2)
        self.e = fresh._replace(coefficients=None, group=torch.arange(ROWS) % 6)

    def run(self, batch_e: fx.Batch | None, **options: Any) -> fx.Influence:
        return fx.influence(self.params, self.u, batch_e, self.state, apply=self.apply, **options)

    def parts(self, batch_e: fx.Batch) -> Tensor:
        u = self.u._replace(coefficients=present(self.u.coefficients).nan_to_num())
        return reference.influence(self.apply, self.params, u, batch_e, self.state).parts


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "rollouts": {"per_token": False},
    "no budget": {"memory_budget": 0},
    "matrix": {"matrix": True},
    "no error bars": {"stderr": False},
    "labels": {"labels": torch.arange(ROWS * WIDTH).view(ROWS, WIDTH) % 3},
    "labels, no budget": {"labels": torch.arange(ROWS * WIDTH).view(ROWS, WIDTH) % 3, "memory_budget": 0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("silent", SILENT.values(), ids=SILENT)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_influences_beside_rows_without_loss(silent: list[int], options: dict[str, Any], with_gradient: bool) -> None:
    x = Inputs(silent)
    gradient = {"grad": batch_gradient(x.params, x.u, x.apply)} if with_gradient else {}
    parts = x.parts(x.u._replace(coefficients=None))
    fold = (torch.arange(ROWS) % 6).tolist()
    expected = cross_fitted(parts, x.u.completion_mask.sum(-1).tolist(), fold, fold, "token")
    on_u, on_e = x.run(None, **options, **gradient), x.run(x.e, **options, **gradient)
    size = parts.abs().sum()
    assert_close(on_u.per_sequence, expected.per_sequence, size)
    assert_close(on_e.per_sequence, x.parts(x.e).sum(0), x.parts(x.e).abs().sum())
    for out in (on_u, on_e):
        silent_rows = [field[x.silent] for field in (out.per_sequence, out.per_token) if field is not None]
        assert not any(rows.any() for rows in silent_rows)
    if options.get("stderr", True):
        assert_close(on_u.stderr, expected.stderr, size)
        assert not on_u.stderr[x.silent].any()
    if "labels" in options:
        assert_close(on_u.sums(options["labels"]).influence.sum(), on_u.per_sequence.sum(), size)


def test_rows_without_loss_take_no_pass() -> None:
    # Probes of the policy take the first row, and the first tokens of two more.
    x = Inputs([3, 6, 9, 8])
    ids = x.u.input_ids.where(x.u.input_ids != MARKER, 0)
    marked = ids.clone()
    marked[x.silent, -1] = MARKER
    x.u = x.u._replace(input_ids=marked, attention_mask=torch.ones_like(x.u.attention_mask))
    x.e = x.e._replace(input_ids=x.e.input_ids.where(x.e.input_ids != MARKER, 0))
    scored: list[Tensor] = []
    plain = x.apply

    def recorded(params: fx.Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        scored.append(input_ids)
        return plain(params, input_ids, attention_mask)

    x.apply = recorded
    x.run(x.e)
    assert scored
    assert not any((input_ids == MARKER).any() for input_ids in scored)
