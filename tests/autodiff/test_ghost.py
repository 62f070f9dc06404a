"""Influences from U's factors against those of the JVP, and when there are none."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from helpers.cases import assert_close, random_adamw_state, random_batch
from helpers.strategies import PRECONDITIONERS, Case, cases
from hypothesis import given, settings

import fx_influence as fx
from fx_influence.autodiff import ghost as contraction
from fx_influence.autodiff.ghost import linearize_losses
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.layer_io.row_gradients import LayerIOs
from fx_influence.autodiff.layer_io.support import layer_io_bytes_per_token
from fx_influence.batching.microbatch import MicroBatch, micro_batches
from fx_influence.types import Preconditioner

VOCAB, WIDTH = 11, 7
MODULE = importlib.import_module("fx_influence.attribution.influence")


@given(case=cases())
@settings(max_examples=10)
def test_the_contraction_is_the_inner_product_with_every_rows_gradient(case: Case) -> None:
    made = linearize_losses(case.params, case.batch_u, case.apply, case.temperature, 2, 10**9)
    grads = fx.per_sample_grads(fx.rollout_loss(case.apply, case.temperature), case.params, case.batch_u)
    if made is None:
        # Only a table of positions that is added whole to every row has no factor.
        assert "position.weight" in case.params
        return
    g, contract = made
    u = {name: torch.randn(p.shape, dtype=torch.float64) * 10.0**k for k, (name, p) in enumerate(case.params.items())}
    expected = sum((grads[name] * u[name]).flatten(1).sum(1) for name in u)
    size = torch.stack([(grads[name] * u[name]).abs().flatten(1).sum(1) for name in u]).sum(0)
    assert_close(contract([u])[0], torch.as_tensor(expected), size)
    first = next(iter(u))
    alone = (grads[first] * u[first]).flatten(1).sum(1)
    assert_close(contract([{first: u[first]}])[0], alone, size)
    for found, wanted in zip(contract([u, {first: u[first]}, {}]), (expected, alone, 0 * alone), strict=True):
        assert_close(found, torch.as_tensor(wanted), size)
    for name, value in batch_gradient(case.params, case.batch_u, case.apply, case.temperature).items():
        own = g[name]
        assert (own is None) == (value is None)
        if own is not None and value is not None:
            assert_close(own, value, value.abs().max())


def problem(rows: int = 5) -> tuple[fx.Params, fx.Batch, fx.Batch, fx.AdamWState, fx.Apply]:
    apply, params = fx.make_functional(Policy(VOCAB, 6))
    generator = torch.Generator().manual_seed(4)
    u, e = (random_batch(generator, rows, WIDTH, VOCAB) for _ in range(2))
    return params, u, e, random_adamw_state(generator, params), apply


class Policy(torch.nn.Module):
    """Embedding, two linear maps with a bias, a norm: every use has a factor."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = torch.nn.Embedding(vocab, width, dtype=torch.float64)
        self.norm = torch.nn.LayerNorm(width, dtype=torch.float64)
        self.mix = torch.nn.Linear(width, width, dtype=torch.float64)
        self.head = torch.nn.Linear(width, vocab, dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.token(input_ids) * attention_mask.unsqueeze(-1)
        return self.head(torch.tanh(self.mix(self.norm(x.cumsum(1)))))


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("stderr", [True, False])
def test_without_tokens_the_influences_are_the_same(preconditioner: Preconditioner, stderr: bool) -> None:
    *given, apply = problem()
    whole = fx.influence(*given, apply=apply, preconditioner=preconditioner, stderr=stderr)
    short = fx.influence(*given, apply=apply, preconditioner=preconditioner, stderr=stderr, per_token=False)
    assert short.per_token is None
    for field in ("per_sequence", "total", "baseline"):
        assert_close(getattr(short, field), getattr(whole, field))
    assert whole.per_sequence.abs().max() > 0
    if stderr:
        assert_close(short.stderr, whole.stderr)
    else:
        assert short.stderr.isnan().all()


@pytest.mark.parametrize("options", [{"stderr": True}, {"per_token": False, "stderr": False}, {"stderr": False}])
def test_a_budget_of_nothing_keeps_nothing_and_changes_nothing(options: dict[str, bool]) -> None:
    *given, apply = problem()
    params, u = given[0], given[1]
    assert linearize_losses(params, u, apply, 1.0, None, 0) is None
    kept, frugal = (fx.influence(*given, apply=apply, chunk_size=2, memory_budget=b, **options) for b in (10**9, 0))
    for field in ("per_sequence", "stderr", "per_token", "total"):
        one, other = getattr(kept, field), getattr(frugal, field)
        if one is None:
            assert other is None
        elif not one.isnan().all():
            assert_close(one, other)


@pytest.mark.parametrize("fit", [0, 1, 3])
def test_factors_that_do_not_fit_are_made_again(monkeypatch: pytest.MonkeyPatch, fit: int) -> None:
    params, u, _, _, apply = problem()
    made: list[int] = []
    whole = contraction.collect_layer_io

    def watched(some: fx.Params, batch: fx.Batch, part: MicroBatch, *options: Any) -> Any:
        made.append(len(part.row_index))
        return whole(some, batch, part, *options)

    monkeypatch.setattr(contraction, "collect_layer_io", watched)
    per_token = layer_io_bytes_per_token(params, u, apply, frozenset(params))
    budget = sum(per_token * part.input_ids.numel() for part in micro_batches(u, 2, left_alignable=False)[:fit])
    found = linearize_losses(params, u, apply, 1.0, 2, budget, at_once=2)
    alone = linearize_losses(params, u, apply, 1.0, 2, budget)
    assert (alone is None) == (fit < 3)
    assert found is not None
    made.clear()
    along = [{name: p.cos() for name, p in params.items()}, params]
    grads = fx.per_sample_grads(fx.rollout_loss(apply), params, u)
    for row, v in zip(found[1](along), along, strict=True):
        assert_close(row, torch.stack([(grads[name] * v[name]).flatten(1).sum(1) for name in v]).sum(0))
    assert made == [2, 2, 1][fit:]


@pytest.mark.parametrize("per_token", [True, False])
def test_error_bars_are_the_same_however_many_directions_go_together(
    monkeypatch: pytest.MonkeyPatch, per_token: bool
) -> None:
    *given, apply = problem(rows=12)
    params = given[0]
    size = sum(p.numel() * 8 for p in params.values())
    assert [contraction.max_directions(params, b) for b in (0, 4 * size, 12 * size)] == [1, 1, 3]
    asked: list[int] = []
    whole = contraction.inner_products

    def watched(kept: LayerIOs, directions: list[fx.Params], rows: int) -> torch.Tensor:
        asked.append(len(directions))
        return whole(kept, directions, rows)

    monkeypatch.setattr(contraction, "inner_products", watched)
    # One row of each weight at a time.
    monkeypatch.setattr(contraction, "MAX_GRADIENT_ENTRIES", 100)
    found = []
    for together, blocks in ((1, [1] * 8), (5, [5, 3]), (9, [8])):
        monkeypatch.setattr(MODULE, "max_directions", lambda *_, together=together: together)
        found.append(fx.influence(*given, apply=apply, per_token=per_token))
        # And all of them at once, whose difference from the others is the rounding.
        assert asked == [*blocks, 1]
        asked.clear()
    for out in found[1:]:
        for field in ("per_sequence", "stderr", "total_stderr"):
            assert_close(getattr(out, field), getattr(found[0], field))


def test_with_a_parameter_without_factors_the_jvp_serves() -> None:
    params, u, e, state, policy = problem()

    def apply(params: fx.Params, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return policy({**params, "mix.weight": 2 * params["mix.weight"]}, ids, mask)

    assert linearize_losses(params, u, apply, 1.0, None, 10**9) is None
    whole, short = (fx.influence(params, u, e, state, apply=apply, per_token=wanted) for wanted in (True, False))
    assert short.per_token is None
    assert_close(short.per_sequence, whole.per_sequence)


def test_a_factor_that_is_lost_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    *given, apply = problem()
    whole = contraction.inner_products

    def without_one(factors: object, directions: list[fx.Params], rows: int) -> torch.Tensor:
        assert isinstance(factors, dict)
        return whole({k: v for k, v in factors.items() if k != "mix.weight"}, directions, rows)

    monkeypatch.setattr(contraction, "inner_products", without_one)
    with pytest.raises(fx.IdentityError, match="ghost products over U"):
        fx.influence(*given, apply=apply, stderr=False, per_token=False)
    with pytest.raises(fx.IdentityError, match="the random groups of E"):
        fx.influence(*given, apply=apply)
