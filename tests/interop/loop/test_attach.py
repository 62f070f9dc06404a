"""Steps of a training loop that ``fx.attach`` measures: coefficients, influences, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.loops import COUNT, MAX_NORM, PROMPTS, Loop, Rollouts, batch_of, closed_form, completion_values, named
from helpers.tiny_models import AttentionModel, make_float64
from helpers.tolerances import assert_close_to_rounding, policy_terms
from torch import Tensor, nn

import fx_influence as fx
from fx_influence.interop.live import measurement
from fx_influence.optim.clipping import UnclippedGradient

EVERY_STEP: dict[str, Any] = {"every": 1}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[fx.Batch, dict[str, Any]]]:
    """Return the update batch and options of each call of ``influence`` from now on."""
    recorded: list[tuple[fx.Batch, dict[str, Any]]] = []

    def record(params: Any, batch_u: fx.Batch, batch_e: Any, state: Any, **options: Any) -> fx.Influence:
        recorded.append((batch_u, options))
        return fx.influence(params, batch_u, batch_e, state, **options)

    monkeypatch.setattr(measurement, "influence", record)
    return recorded


class ByHand:
    """``fx.influence`` called by hand before each step of a loop, with the gradient before clipping."""

    def __init__(self) -> None:
        self.results: list[fx.Influence] = []

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, rollouts: Rollouts) -> None:
        apply, params = fx.make_functional(model)
        with torch.no_grad():
            coefficients = closed_form(rollouts, completion_values(model, rollouts)[0])
        grad = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        assert sum(float(g.square().sum()) for g in grad.values() if g is not None) ** 0.5 > MAX_NORM, "clipping acts"
        state = fx.adamw_state(optimizer, model)
        batch = batch_of(rollouts, coefficients)
        self.results.append(fx.influence(params, batch, None, state, apply=apply, grad=grad, max_grad_norm=MAX_NORM))


def assert_close(model: nn.Module, actual: Tensor, expected: Tensor, scale: Tensor) -> None:
    terms = policy_terms(dict(model.named_parameters()), 8)
    # The float64 sums of a step are divided by its moments, which amplifies their rounding.
    assert_close_to_rounding(actual, expected, terms=100 * terms, scale=float(scale), dtype=torch.float64)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_step_is_attributed_as_by_hand(micro_batches: int, calls: list[tuple[fx.Batch, dict[str, Any]]]) -> None:
    """The clipping factor is measured, so it equals that of the norm before clipping."""
    by_hand, results = ByHand(), list[fx.Influence]()
    options = {**EVERY_STEP, "on_step": lambda _, out: results.append(out)}
    loop = Loop(2, micro_batches, options, before_step=by_hand)
    capture = loop.run()
    assert capture is not None
    assert [metrics["step"] for metrics in capture.history] == [1, 2]
    # No copy of the gradient before clipping is held.
    assert all(isinstance(options["grad"], UnclippedGradient) for _, options in calls)
    for out, expected, metrics in zip(results, by_hand.results, capture.history, strict=True):
        scale = expected.per_sequence.abs().sum()
        for name in ("per_sequence", "per_token", "momentum", "weight_decay", "total", "stderr"):
            assert_close(loop.model, getattr(out, name), getattr(expected, name), scale)
        parts = sum(metrics[name] for name in ("momentum", "weight_decay", "rollouts", "unattributed"))
        assert_close(loop.model, torch.tensor(metrics["total"]), torch.tensor(parts), 1e-3 * scale)
        assert abs(metrics["unattributed"]) < 1e-9 * 1e-3 * scale
        assert metrics["momentum"] == pytest.approx(1e-3 * float(expected.momentum), rel=1e-9)


def test_coefficients_are_those_of_the_loss(calls: list[tuple[fx.Batch, dict[str, Any]]]) -> None:
    expected: list[Tensor] = []

    def record(rollouts: Rollouts, logprobs: Tensor, _: Tensor) -> dict[str, Any]:
        expected.append(batch_of(rollouts, closed_form(rollouts, logprobs.detach())).coefficients)  # type: ignore[arg-type]
        return named(rollouts, logprobs)

    Loop(1, 1, EVERY_STEP, record).run()
    ((batch, options),) = calls
    assert batch.coefficients is not None
    assert_close_to_rounding(batch.coefficients, expected[0], terms=10, scale=1.0, dtype=torch.float64)
    assert (batch.coefficients[batch.completion_mask] == 0).any(), "clipping cuts a gradient"
    assert options["max_grad_norm"] == pytest.approx(MAX_NORM, rel=1e-9)
    assert batch.group is not None
    assert batch.group.tolist() == [k // 3 for k in range(COUNT)]


def test_entropy_bonus_has_coefficients(calls: list[tuple[fx.Batch, dict[str, Any]]]) -> None:
    def loss(logprobs: Tensor, entropies: Tensor, rollouts: Rollouts) -> Tensor:
        return -(0.5 * entropies * rollouts.completion_mask).sum() - (logprobs * rollouts.completion_mask).sum()

    def add(rollouts: Rollouts, logprobs: Tensor, entropies: Tensor) -> dict[str, Any]:
        return {**named(rollouts, logprobs), "entropies": entropies}

    capture = Loop(1, 1, EVERY_STEP, add, loss).run()
    assert capture is not None
    ((batch, _),) = calls
    assert batch.entropy_coefficients is not None
    assert torch.equal(batch.entropy_coefficients, 0.5 * batch.completion_mask.double())
    assert capture.history[0]["unattributed"] == pytest.approx(0.0, abs=1e-9)


def test_loss_beside_the_rollouts_is_unattributed() -> None:
    def loss(logprobs: Tensor, entropies: Tensor, rollouts: Rollouts) -> Tensor:
        return -(logprobs * rollouts.completion_mask).sum() + entropies.mean()

    loop = Loop(1, 1, EVERY_STEP, loss=loss)
    # A denominator that does not respond to the gradient: measured and predicted are then one to first order.
    loop.optimizer.param_groups[0]["eps"] = 1.0
    capture = loop.run()
    assert capture is not None
    metrics = capture.history[0]
    assert abs(metrics["unattributed"]) > 1e-3 * abs(metrics["total"])
    assert metrics["measured"] == pytest.approx(metrics["total"], rel=0.2)


def test_older_rollouts_are_weighted() -> None:
    def add(rollouts: Rollouts, logprobs: Tensor, _: Tensor) -> dict[str, Any]:
        return {**named(rollouts, logprobs), "behaviour_logprobs": rollouts.behaviour}

    results: list[fx.Influence] = []
    Loop(1, 3, {**EVERY_STEP, "on_step": lambda _, out: results.append(out)}, add).run()
    assert results[0].ess is not None
    assert COUNT / 4 < float(results[0].ess) < COUNT


def test_log_has_at_most_sixteen_figures() -> None:
    logged: list[dict[str, float]] = []
    capture = Loop(2, 1, {"every": 2, "log": logged.append}).run()
    assert capture is not None
    (metrics,), (entry,) = capture.history, logged
    assert metrics["step"] == 2
    assert len(entry) <= 16
    assert entry == {name: metrics[name.removeprefix("entropy_influence/")] for name in entry}
    assert {"entropy_influence/total", "entropy_influence/measured"} <= entry.keys()


def test_metrics_have_the_degrees_of_their_errors() -> None:
    """Each prompt is a fold, and a rollout's own is left out; the jackknife of the measured change has all prompts."""
    capture = Loop(1, 1, EVERY_STEP).run()
    assert capture is not None
    [metrics] = capture.history
    assert metrics["degrees_of_freedom"] == PROMPTS - 2
    assert metrics["measured_degrees_of_freedom"] == PROMPTS - 1


def with_dropout(model: nn.Module) -> nn.Module:
    model.register_module("extra", nn.Dropout(0.1))
    return model


@pytest.mark.parametrize(
    ("prepare", "options", "error", "message"),
    [
        (lambda m: (torch.optim.SGD(m.parameters()), m), {}, TypeError, "SGD, whose step is not AdamW's"),
        (lambda m: (torch.optim.AdamW([nn.Parameter(torch.ones(2))]), m), {}, ValueError, "not a parameter of"),
        (lambda m: (torch.optim.AdamW(m.parameters()), with_dropout(m)), {}, ValueError, "extra has dropout 0.1"),
        (lambda m: (torch.optim.AdamW(m.parameters()), m), {"every": 0}, ValueError, "every is 0"),
        (lambda m: (torch.optim.AdamW(m.parameters()), m), {"temperature": 0.0}, ValueError, "temperature is 0"),
        (
            lambda m: (torch.optim.AdamW(m.parameters()), m),
            {"objective": fx.Entropy(score=0.5)},
            ValueError,
            "score is 0.5",
        ),
        (
            lambda m: (torch.optim.AdamW(m.parameters()), m),
            {"autocast": torch.int8},
            ValueError,
            "autocast is torch.in",
        ),
    ],
    ids=["optimizer", "foreign", "dropout", "every", "temperature", "score", "autocast"],
)
def test_attach_refuses(prepare: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    optimizer, model = prepare(make_float64(AttentionModel))
    with pytest.raises(error, match=message):
        fx.attach(optimizer, model, **options)
    assert not optimizer._optimizer_step_pre_hooks


def test_detach_leaves_no_hook() -> None:
    loop = Loop()
    capture = fx.attach(loop.optimizer, loop.model, every=1)
    capture.detach()
    assert not loop.optimizer._optimizer_step_pre_hooks
    assert not loop.optimizer._optimizer_step_post_hooks
    assert not any(p._post_accumulate_grad_hooks for p in loop.model.parameters())
