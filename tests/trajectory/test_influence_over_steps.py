"""Influences over several steps against windows that a real optimizer replays with other weights, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.cases import make_apply
from helpers.strategies import seeds
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding, assert_within, central_difference
from helpers.windows import WIDTH, Run, over_steps, random_run, scaled, size_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fx_influence as fx
from fx_influence.core.computed import PartitionedTensors
from fx_influence.optim.step import AdamWStep
from fx_influence.trajectory.step_files import StepFile
from fx_influence.types import Clip, IdentityError

WIDTHS = (1e-4, 1e-5)
"""Changes of weights; the second is for windows in which amsgrad's maximum changes hands within the first."""

SHARP = 1e-6
"""Largest bound relative to the sum of |delta_i|, so that no lost term hides below it."""

clips: st.SearchStrategy[Clip] = st.sampled_from(["frozen", "differentiated"])

hypers = st.fixed_dictionaries(
    {},
    optional={
        "amsgrad": st.just(True),
        "maximize": st.just(True),
        "weight_decay": st.sampled_from([0.0, 0.7]),
        "beta1": st.sampled_from([0.0, 0.95]),
        "beta2": st.sampled_from([0.5, 0.999]),
        "step": st.sampled_from([0, 20]),
        "absent": st.just(("norm.bias",)),
    },
)


def assert_derivative(run: Run, actual: Tensor, size: Tensor, **which: int) -> None:
    """Compare with the change of entropy as the window is made with other weights."""
    entropy_change = run.entropy_change()
    for width in WIDTHS:
        change = central_difference(
            lambda eta: entropy_change(scaled(run, eta, **which)), width, terms=TINY_POLICY, magnitude=1e-2
        )
        if change.bound <= SHARP * float(size):
            break
    assert_within(actual, change.slope, change.bound)
    assert change.bound <= SHARP * float(size)


def assert_matches_replays(run: Run, clip: Clip, curvature: bool) -> None:
    """Scale everything at once, then all weights of the first step, and one rollout's in the middle."""
    out, middle = over_steps(run, clip=clip, curvature=curvature), len(run.rates) // 2
    replayed = run.holding(clip=clip == "frozen", gradients=not curvature)
    assert_derivative(replayed, out.total, size_of(out) + out.momentum.abs() + out.second_moment.abs())
    assert_derivative(replayed, out.per_sequence[0].sum(), size_of(out), step=0)
    assert_derivative(replayed, out.per_sequence[middle][1], size_of(out), step=middle, row=1)


@pytest.mark.slow
@given(
    seed=seeds,
    steps=st.integers(1, 4),
    ratio=st.booleans(),
    bonus=st.booleans(),
    max_grad_norm=st.sampled_from([None, 0.5, 1e3]),
    clip=clips,
    curvature=st.sampled_from([True, True, False]),
    hyper=hypers,
)
@settings(max_examples=25)
def test_influences_match_replayed_windows(
    seed: int,
    steps: int,
    ratio: bool,
    bonus: bool,
    max_grad_norm: float | None,
    clip: Clip,
    curvature: bool,
    hyper: dict[str, Any],
) -> None:
    run = random_run(seed, steps, ratio=ratio, bonus=bonus, max_grad_norm=max_grad_norm, temperature=1.3, **hyper)
    # A clipped gradient that is nearly one rollout's has no influence, of which no difference tells a millionth.
    assume(float(size_of(over_steps(run, clip=clip, curvature=curvature))) >= 1e-4)
    assert_matches_replays(run, clip, curvature)


@pytest.mark.parametrize(("clip", "curvature"), [("frozen", True), ("differentiated", True), ("frozen", False)])
def test_influences_match_a_replayed_window(clip: Clip, curvature: bool) -> None:
    assert_matches_replays(random_run(7, 2, bonus=True, max_grad_norm=0.5), clip, curvature)


def test_curvature_is_seen_over_several_steps_alone() -> None:
    run = random_run(3, 3)
    out, without = over_steps(run), over_steps(run, curvature=False)
    assert torch.equal(out.per_sequence[-1], without.per_sequence[-1])
    gap = (out.per_sequence[0] - without.per_sequence[0]).abs().max()
    assert gap > 0.01 * out.per_sequence[0].abs().max()


def test_ratio_is_seen_over_several_steps() -> None:
    """Without its slopes the coefficient's dependence on the policy is lost."""
    run = random_run(3, 3)
    window = run.window()
    fixed = replace(window, steps=[replace(step, coefficient_slopes=None) for step in window.steps])
    out = over_steps(run)
    other = fx.influence_over_steps(fixed, run.batch_e, apply=run.apply)
    assert (out.per_sequence[0] - other.per_sequence[0]).abs().max() > 0.01 * out.per_sequence[0].abs().max()


@pytest.mark.parametrize("preconditioner", ["jacobian", "frozen"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_one_step_is_lr_times_influence(preconditioner: Any, max_grad_norm: float | None) -> None:
    """At a rate that rounding swallows, the objective's gradient after the step is that before it."""
    rate = 1e-20
    run = random_run(5, 1, bonus=True, max_grad_norm=max_grad_norm, rate=rate)
    window = run.window()
    one = fx.influence(
        window.params,
        window.steps[0].batch,
        run.batch_e,
        window.opt_state,
        apply=run.apply,
        preconditioner=preconditioner,
        max_grad_norm=max_grad_norm,
    )
    out = over_steps(run, preconditioner=preconditioner, per_token=True)
    assert out.per_token is not None
    assert one.per_token is not None
    size = one.per_sequence.abs().max() + 1
    pairs = [
        (out.per_sequence[0], one.per_sequence),
        (out.per_token[0], one.per_token),
        (out.momentum, one.momentum),
        (out.weight_decay.sum(), one.weight_decay),
    ]
    pairs += [(out.total, one.total)] if preconditioner == "frozen" else []
    for actual, expected in pairs:
        assert_close_to_rounding(actual / rate, expected, terms=TINY_POLICY, scale=size)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_frozen_parts_add_up_to_the_windows_movement(max_grad_norm: float | None) -> None:
    """Without decay, denominators and gradients held fixed, theta_K - theta_0 is a sum of rollouts and momentum."""
    run = random_run(4, 3, max_grad_norm=max_grad_norm, weight_decay=0.0)
    out = over_steps(run, preconditioner="frozen", curvature=False)
    end, points, _ = run.made(run.ones())
    movement = {name: end[name] - points[0][name] for name in end}
    first = fx.jvp_delta(end, movement, run.batch_e, apply=run.apply, second_order=False).first
    assert_close_to_rounding(out.total, first, terms=TINY_POLICY, scale=1 + size_of(out))
    assert out.second_moment == 0


@given(seed=seeds, steps=st.integers(1, 4), max_grad_norm=st.sampled_from([None, 0.5]), hyper=hypers)
@settings(max_examples=8)
def test_scaling_of_gradients_and_moments_cancels(
    seed: int, steps: int, max_grad_norm: float | None, hyper: dict[str, Any]
) -> None:
    out = over_steps(random_run(seed, steps, max_grad_norm=max_grad_norm, **hyper))
    total = torch.cat(out.per_sequence).sum() + out.momentum + 2 * out.second_moment + out.eps
    size = size_of(out) + out.momentum.abs() + out.second_moment.abs()
    assert_close_to_rounding(total, 0.0, terms=TINY_POLICY, scale=1 + size)
    assert_close_to_rounding(out.residual, torch.zeros_like(out.residual), terms=TINY_POLICY, scale=1 + size)


@pytest.mark.parametrize("in_files", [False, True])
def test_budget_changes_nothing(in_files: bool, tmp_path: Path) -> None:
    """Segments of two steps of four are replayed, or all are read from files, from the same states."""
    run = random_run(2, 4, bonus=True, amsgrad=True)
    stored = over_steps(run, per_token=True)
    replayed = over_steps(run, per_token=True, memory_budget=0, states_dir=tmp_path if in_files else None)
    assert stored.per_token is not None
    assert replayed.per_token is not None
    pairs = zip((*stored.per_sequence, *stored.per_token), (*replayed.per_sequence, *replayed.per_token), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(stored.total, replayed.total)
    assert not list(tmp_path.iterdir())


def test_states_that_exceed_the_budget_are_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is read to go on from it, and again from the last to the first; then the files are deleted."""
    run, read = random_run(2, 3), []
    original = StepFile.read

    def recorded(self: StepFile) -> AdamWStep:
        assert not self.step.params
        read.append((self.path.parent.parent, self.path.name))
        return original(self)

    monkeypatch.setattr(StepFile, "read", recorded)
    over_steps(run, states_dir=tmp_path)
    assert not read
    over_steps(run, memory_budget=0, states_dir=tmp_path)
    assert read == [(tmp_path, f"{k}.pt") for k in (0, 1, 2, 2, 1, 0)]
    assert not list(tmp_path.iterdir())


def test_files_are_deleted_where_the_call_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepFile, "read", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        over_steps(random_run(2, 2), memory_budget=0, states_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_directories_without_room_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = random_run(2, 2)
    with pytest.raises(ValueError, match="expected an existing directory"):
        over_steps(run, states_dir=tmp_path / "absent")
    with pytest.raises(TypeError, match="states_dir is of type int"):
        over_steps(run, states_dir=3)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match="a larger memory_budget"):
        over_steps(run, memory_budget=0, states_dir=tmp_path)
    # Nothing is written where all fits.
    over_steps(run, states_dir=tmp_path)


def test_result_is_pure_and_tokens_add_up() -> None:
    run = random_run(2, 2)
    window = run.window()
    before = {name: p.clone() for name, p in window.params.items()}
    out = fx.influence_over_steps(window, run.batch_e, apply=run.apply, per_token=True)
    assert all(torch.equal(window.params[name], p) for name, p in before.items())
    assert out.per_token is not None
    for tokens, rows in zip(out.per_token, out.per_sequence, strict=True):
        assert_close_to_rounding(tokens.sum(-1), rows, terms=WIDTH)
    assert over_steps(run).per_token is None


def test_float32_matches_float64() -> None:
    run = random_run(6, 3)
    window = run.window()
    low_state = window.opt_state._replace(
        exp_avg={n: x.float() for n, x in window.opt_state.exp_avg.items()},
        exp_avg_sq={n: x.float() for n, x in window.opt_state.exp_avg_sq.items()},
    )
    low = replace(window, params={n: p.float() for n, p in window.params.items()}, opt_state=low_state)
    out = fx.influence_over_steps(low, run.batch_e, apply=make_apply(run.model)[0])
    exact = over_steps(run)
    for a, b in zip(out.per_sequence, exact.per_sequence, strict=True):
        assert_close_to_rounding(a, b, terms=TINY_POLICY, scale=size_of(exact), dtype=torch.float32)


def test_lost_derivative_is_refused() -> None:
    """A policy that detaches in forward mode alone has another JVP than gradient."""
    run = random_run(2, 2)

    def broken(params: fx.Params, ids: Tensor, mask: Tensor) -> Tensor:
        logits = run.apply(params, ids, mask)
        tangent = torch.autograd.forward_ad.unpack_dual(logits).tangent
        return logits if tangent is None else torch.autograd.forward_ad.make_dual(logits.detach(), 0.9 * tangent)

    with pytest.raises((IdentityError, RuntimeError)):
        fx.influence_over_steps(run.window(), run.batch_e, apply=broken)


def changed(run: Run, **fields: Any) -> fx.Window:
    window = run.window()
    return replace(window, steps=[window.steps[0], replace(window.steps[1], **fields)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": -1.0}, r"window.steps\[1\].lr is -1.0"),
        ({"lr": float("nan")}, r"window.steps\[1\].lr is nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"coefficient_slopes": torch.ones(2, 2)}, r"coefficient_slopes has shape \(2, 2\)"),
        ({"hyper": {}}, r"window.steps\[1\].hyper has other parameters"),
    ],
)
def test_steps_that_cannot_be_replayed_are_refused(fields: dict[str, Any], message: str) -> None:
    run = random_run(2, 2)
    with pytest.raises(ValueError, match=message):
        fx.influence_over_steps(changed(run, **fields), run.batch_e, apply=run.apply)


def test_windows_of_other_kinds_are_refused() -> None:
    run = random_run(2, 2)
    window = run.window()
    with pytest.raises(TypeError, match="window is"):
        fx.influence_over_steps(window.steps, run.batch_e, apply=run.apply)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"window\.steps is empty"):
        fx.influence_over_steps(replace(window, steps=[]), run.batch_e, apply=run.apply)
    rounded = replace(window, opt_state=window.opt_state._replace(master_weights=window.params))
    with pytest.raises(ValueError, match=r"window\.opt_state has master_weights"):
        fx.influence_over_steps(rounded, run.batch_e, apply=run.apply)
    parts: Any = PartitionedTensors({}, SimpleNamespace())  # type: ignore[arg-type]  # nothing is read of it
    partitioned = replace(window, opt_state=window.opt_state._replace(exp_avg=parts))
    with pytest.raises(ValueError, match=r"window\.opt_state has live moments .* without copy=False"):
        fx.influence_over_steps(partitioned, run.batch_e, apply=run.apply)
    with pytest.raises(TypeError, match="batch_e"):
        fx.influence_over_steps(window, window.steps, apply=run.apply)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="preconditioner is 'lifetime'"):
        over_steps(run, preconditioner="lifetime")


def test_hyperparameters_change_within_the_window() -> None:
    """A step whose hyperparameters differ equals one of a state that has them from the beginning."""
    run = random_run(2, 2)
    window = run.window()
    other = {name: replace(h, beta2=0.7, weight_decay=0.0) for name, h in window.opt_state.hyper.items()}
    late = replace(window, steps=[replace(window.steps[0], hyper=other), window.steps[1]])
    early = replace(window, opt_state=window.opt_state._replace(hyper=other))
    a, b = (fx.influence_over_steps(w, run.batch_e, apply=run.apply) for w in (late, early))
    assert all(torch.equal(x, y) for x, y in zip(a.per_sequence, b.per_sequence, strict=True))
