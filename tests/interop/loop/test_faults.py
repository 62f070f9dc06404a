"""Measuring a training loop changes no bit of it, whatever fails; what cannot be attributed is one warning."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.loops import COUNT, PROMPT, WIDTH, Loop, Rollouts, completion_values, grpo_loss, named, sample_rollouts
from torch import Tensor, nn

import fx_influence as fx
from fx_influence.interop.live import measurement

EVERY_STEP: dict[str, Any] = {"every": 1}


def random_states() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist()


def run(loop: Loop) -> tuple[fx.interop.StepCapture | None, list[str]]:
    """Train, and return the capture and the warnings about steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        capture = loop.run()
    return capture, [str(w.message) for w in caught if str(w.message).startswith("step ")]


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def assert_unchanged(measured: Loop, plain: Loop) -> None:
    weights, expected = measured.weights(), plain.weights()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    states, expected_states = measured.optimizer.state_dict()["state"], plain.optimizer.state_dict()["state"]
    for k, state in expected_states.items():
        assert all(torch.equal(states[k][name], state[name]) for name in state)


def draw(*_: object) -> None:
    """Draw from every random state, as a measurement may."""
    torch.rand(2), random.random(), np.random.rand(2)


def test_measuring_leaves_the_training_unchanged() -> None:
    plain = Loop(3, 3)
    plain.run()
    before = random_states()
    measured = Loop(3, 3, {**EVERY_STEP, "on_step": draw})
    capture, texts = run(measured)
    assert capture is not None
    assert [metrics["step"] for metrics in capture.history] == [1, 2, 3]
    assert not texts
    assert_unchanged(measured, plain)
    assert random_states() == before
    assert all(p.grad is None for p in measured.model.parameters())


def bad_shape(rollouts: Rollouts, logprobs: Tensor, _: Tensor) -> dict[str, Any]:
    return {**named(rollouts, logprobs), "completion_mask": rollouts.completion_mask[:, :0]}


@pytest.mark.parametrize(
    ("name", "options", "add", "message"),
    [
        ("influence", {}, None, "RuntimeError: out of luck"),
        ("adamw_state", {}, None, "RuntimeError: out of luck"),
        ("measure_change", {}, None, "RuntimeError: out of luck"),
        (None, {"log": failing(KeyError("metric"))}, None, "KeyError: 'metric'"),
        (None, {"on_step": failing(OSError("disk"))}, None, "OSError: disk"),
        (None, {}, lambda r, x, _: {**named(r, x), "logprobs": x[:, :, None]}, "a value for each token has shape"),
        (None, {}, lambda r, x, _: {**named(r, x), "logprobs": x.tolist()}, "logprobs is of type list"),
        (None, {"temperature": 2.0}, None, "Pass log-probabilities of the very tokens"),
        (None, {}, lambda r, x, _: {**named(r, x), "logprobs": x - 1}, "no backward pass reached their logprobs"),
        (None, {}, lambda r, x, _: {**named(r, x), "group": torch.zeros(2)}, "group has 2 entries; expected"),
    ],
)
def test_fault_is_one_warning_a_step(
    name: str | None, options: dict[str, Any], add: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Loop(2)
    plain.run()
    measured = Loop(2, 1, {**EVERY_STEP, **options}, **({} if add is None else {"add": add}))
    if name is not None:
        measured.before_step = lambda *_: monkeypatch.setattr(measurement, name, failing(RuntimeError("out of luck")))
    capture, texts = run(measured)
    assert capture is not None
    assert not capture.history
    assert [text[:24] for text in texts] == ["step 1 is not attributed", "step 2 is not attributed"]
    assert all(message in text for text in texts)
    assert_unchanged(measured, plain)


def test_interruption_ends_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "influence", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        Loop(1, 1, EVERY_STEP).run()


def clip_each_parameter(model: nn.Module) -> None:
    for p in model.parameters():
        torch.nn.utils.clip_grad_norm_([p], 1e-3)


def double(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad *= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [(clip_each_parameter, "by other factors for some parameters"), (double, "was multiplied by 2 between")],
)
def test_gradient_changed_otherwise_is_refused(change: Callable[[nn.Module], None], message: str) -> None:
    capture, texts = run(Loop(1, 1, EVERY_STEP, change=change))
    assert capture is not None
    assert not capture.history
    assert message in texts[0]


def test_step_without_rollouts_is_one_warning() -> None:
    loop = Loop()
    capture = fx.attach(loop.optimizer, loop.model, every=1)
    loop.model(torch.ones(1, 3, dtype=torch.int64)).sum().backward()
    with pytest.warns(UserWarning, match="step 1 is not attributed: 0 micro-batches were added"):
        loop.optimizer.step()
    assert not capture.history


def test_step_with_a_closure_is_refused() -> None:
    loop = Loop()
    fx.attach(loop.optimizer, loop.model, every=1)
    rollouts = sample_rollouts(loop.model, 0)

    def closure() -> Tensor:
        loss = grpo_loss(completion_values(loop.model, rollouts)[0], rollouts)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="the optimizer's step has a closure"):
        loop.optimizer.step(closure)


def test_micro_batch_without_backward_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[fx.Batch] = []

    def record(params: Any, batch_u: fx.Batch, *rest: Any, **options: Any) -> fx.Influence:
        batches.append(batch_u)
        return fx.influence(params, batch_u, *rest, **options)

    monkeypatch.setattr(measurement, "influence", record)
    measured = Loop(1, 3, EVERY_STEP, add=lambda r, x, _: named(r, x.detach() if r.input_ids[0, 0] == first else x))
    first = int(sample_rollouts(measured.model, 0).input_ids[0, 0])
    capture, texts = run(measured)
    assert capture is not None
    assert texts == [
        "step 1: no backward pass reached the logprobs of 1 of 3 micro-batches, whose coefficients are taken to be 0, "
        "as in other steps without a warning"
    ]
    assert batches[0].coefficients is not None
    assert not batches[0].coefficients[: COUNT // 3].any()
    assert capture.history[0]["unattributed"] != 0


def count_rows(counts: list[int], _: int, out: fx.Influence) -> None:
    counts.append(len(out.per_sequence))


def keep(results: list[fx.Influence], _: int, out: fx.Influence) -> None:
    results.append(out)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    ("fused", "clips"), [(False, True), pytest.param(True, True, marks=pytest.mark.slow), (True, False)]
)
def test_step_skipped_by_a_scaler_leaves_no_recording(set_to_none: bool, fused: bool, clips: bool) -> None:
    """The second of three steps overflows; the third is measured on its own rollouts, as the optimizer's second."""
    histories = []
    for scale in (2.0**12, None):
        model = Loop().model.float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=100, enabled=scale is not None)
        rows: list[int] = []
        capture = fx.attach(optimizer, model, every=1, on_step=functools.partial(count_rows, rows))
        for step in range(3):
            rollouts = sample_rollouts(model, step)
            logprobs, _ = completion_values(model, rollouts)
            if scale is None and step == 1:
                continue
            capture.add(**named(rollouts, logprobs), loss_scale=scaler.get_scale())
            overflow = torch.inf if step == 1 else 1.0
            scaler.scale(grpo_loss(logprobs, rollouts).float() * overflow).backward()
            if clips:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=set_to_none)
        assert rows == [COUNT, COUNT]
        assert [metrics["step"] for metrics in capture.history] == [1, 2]
        histories.append(capture.history)
    for metrics, expected in zip(*histories, strict=True):
        for name in ("total", "measured", "rollouts", "stderr"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-8)


def test_parameters_may_be_frozen_meanwhile() -> None:
    loop = Loop(3, 1, EVERY_STEP)
    loop.before_step = lambda model, *_: model.position.weight.requires_grad_(False)
    capture, _ = run(loop)
    assert capture is not None
    assert 3 in [metrics["step"] for metrics in capture.history]


def packed(rollouts: Rollouts, logprobs: Tensor, how: str) -> dict[str, Any]:
    """Return the same rollouts one after another without padding, with ``logprobs`` of their tokens."""
    attended = rollouts.attention_mask
    lengths = attended.sum(1)
    completion = torch.cat([torch.zeros(len(attended), PROMPT, dtype=torch.bool), rollouts.completion_mask], 1)
    where = {
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "position_ids": torch.arange(WIDTH).expand_as(attended)[attended][None],
    }
    return {
        "logprobs": logprobs,
        "input_ids": rollouts.input_ids[attended][None],
        "completion_mask": completion[attended][None],
        "advantages": rollouts.advantages,
        how: where[how],
    }


@pytest.mark.parametrize("how", ["cu_seqlens", "position_ids"])
@pytest.mark.parametrize("shifted", [True, False])
def test_packed_rollouts_give_the_same_result(how: str, shifted: bool) -> None:
    results = []
    for is_packed in (True, False):
        outs: list[fx.Influence] = []
        loop = Loop()
        capture = fx.attach(loop.optimizer, loop.model, every=1, on_step=functools.partial(keep, outs))
        rollouts = sample_rollouts(loop.model, 0)
        logprobs, _ = completion_values(loop.model, rollouts)
        if is_packed:
            in_rows = torch.cat([torch.zeros(COUNT, PROMPT, dtype=torch.float64), logprobs], 1)
            flat = in_rows[rollouts.attention_mask][None, shifted:]
            capture.add(**packed(rollouts, flat, how))
            logprobs = torch.zeros(COUNT, WIDTH, dtype=torch.float64)
            logprobs = logprobs.masked_scatter(
                rollouts.attention_mask, torch.cat([flat.new_zeros(1, shifted), flat], 1).flatten()
            )[:, PROMPT:]
        else:
            capture.add(**named(rollouts, logprobs))
        grpo_loss(logprobs, rollouts).backward()
        loop.optimizer.step()
        results.append((outs[0], capture.history[0]))
    (out, metrics), (expected, expected_metrics) = results
    assert torch.allclose(out.per_sequence, expected.per_sequence, rtol=1e-9, atol=0)
    for name in ("total", "measured", "positive_likely", "stderr"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-9)
