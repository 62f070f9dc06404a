"""``adamw_decompose`` against real steps of ``torch.optim.AdamW`` in float64, for any hyperparameters and state."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers.cases import assert_close
from helpers.strategies import PRECONDITIONERS, Case, cases
from helpers.tolerances import assert_close_to_rounding, rounding_bound
from helpers.trainings import (
    DEFAULTS,
    STEP,
    Training,
    add_gradient,
    assert_made,
    assert_same,
    real_step,
    trainings,
    warm_state,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fx_influence as fx
from fx_influence.testing import reference
from fx_influence.types import AdamWState, Gradients, Preconditioner


@given(training=trainings())
@settings(max_examples=100)
def test_direction_matches_torch_adamw(training: Training) -> None:
    step = training.decompose()
    assert_made(step.direction, training, real_step(training, reference.add(training.grads), training.max_grad_norm))
    assert (step.clip < 1) == (training.max_grad_norm == 0.3)


@given(training=trainings())
@settings(max_examples=50)
def test_direction_follows_master_weights(training: Training) -> None:
    """The forward's weights are roundings to bfloat16 of those that torch's AdamW moves and decays."""
    forward = {name: p.bfloat16().to(p.dtype) for name, p in training.params.items()}
    moved = {name: p for name, p in training.params.items() if name in training.state.hyper}
    state = training.state._replace(master_weights=moved)
    step = fx.adamw_decompose(reference.add(training.grads), state, forward, max_grad_norm=training.max_grad_norm)
    assert_made(step.direction, training, real_step(training, reference.add(training.grads), training.max_grad_norm))


@given(training=trainings(), preconditioner=st.sampled_from(["frozen", "jacobian"]), split=st.integers(0, 4))
@settings(max_examples=100)
def test_parts_add_up_to_torch_step_for_any_grouping(
    training: Training, preconditioner: Preconditioner, split: int
) -> None:
    step = training.decompose(preconditioner)
    real = real_step(training, reference.add(training.grads), training.max_grad_norm)
    alone = step.baseline
    for g in training.grads:
        alone = add_gradient(alone, step.gain, g)
    assert_made(alone, training, real)
    grouped = step.baseline
    for part in (training.grads[:split], training.grads[split:]):
        if part:
            grouped = add_gradient(grouped, step.gain, reference.add(part))
    assert_made(grouped, training, real)
    if preconditioner == "frozen":
        assert_same({name: step.momentum[name] + step.weight_decay[name] for name in real}, step.baseline)


@given(training=trainings(), preconditioner=st.sampled_from(PRECONDITIONERS))
def test_parameters_without_gradient_or_group_do_not_move(training: Training, preconditioner: Preconditioner) -> None:
    last = list(training.params)[-1]
    grads = [{**g, "p0": None} for g in training.grads]
    step = training._replace(grads=grads).decompose(preconditioner)
    real = real_step(training, reference.add(grads), training.max_grad_norm)
    assert last not in training.state.hyper
    assert not real[last].any()
    assert not real["p0"].any()
    for part in step[:-1]:
        assert not part[last].any()
        assert not part["p0"].any()
    absent: list[Gradients] = [{name: x for name, x in g.items() if x is not None} for g in grads]
    for part, other in zip(step[:-1], training._replace(grads=absent).decompose(preconditioner)[:-1], strict=True):
        assert_same(part, other, 0.0)


@pytest.mark.parametrize(("betas", "rate"), [((0.8, 0.9), 0.02), ((0.95, 0.999), 0.3)])
def test_hyperparameters_follow_param_groups(betas: tuple[float, float], rate: float) -> None:
    model = nn.ParameterDict({"p": nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))})
    optimizer = torch.optim.AdamW(model.parameters(), **DEFAULTS)
    training = Training(model, optimizer, [{"p": torch.tensor([0.5, 3.0], dtype=torch.float64)}], None)
    as_built = training.decompose().direction
    optimizer.param_groups[0].update(lr=rate, betas=betas, eps=1e-6, weight_decay=0.2, maximize=True)
    assert_made(training.decompose().direction, training, real_step(training, training.grads[0], None))
    assert (training.decompose().direction["p"] - as_built["p"]).abs().min() > 0.1


def test_direction_uses_initial_lr_when_all_lr_are_0() -> None:
    values = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.ParameterDict({"p0": nn.Parameter(values[0].clone()), "p1": nn.Parameter(values[1].clone())})
    groups = [{"params": [model["p0"]], "lr": 0.02}, {"params": [model["p1"]], "lr": 0.005}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    grads: Gradients = {"p0": values[1].clone(), "p1": values[0].clone()}
    training = Training(model, optimizer, [grads], None)
    expected, before = real_step(training, grads, None), copy.deepcopy(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert training.state.lr == 0.0
    assert_made(training.decompose().direction, training._replace(optimizer=before), expected)
    optimizer.step()
    schedule.step()
    assert training.state.lr == pytest.approx(0.002)
    assert_made(training.decompose().direction, training, real_step(training, grads, None))


@given(training=trainings(), preconditioner=st.sampled_from(PRECONDITIONERS))
@settings(max_examples=50)
def test_adamw_decompose_matches_the_reference(training: Training, preconditioner: Preconditioner) -> None:
    fast = training.decompose(preconditioner)
    slow = reference.adamw(training.grads, training.state, training.params, preconditioner, training.max_grad_norm)
    assert float(fast.clip) == pytest.approx(slow.clip, abs=rounding_bound(torch.float64, STEP, slow.clip))
    for part in ("direction", "momentum", "weight_decay", "gain"):
        for name, x in getattr(slow, part).items():
            assert_close(getattr(fast, part)[name], x)


@given(case=cases())
@settings(max_examples=10)
def test_adamw_decompose_matches_the_reference_on_a_policy(case: Case) -> None:
    rows = reference.sequence_gradients(case.apply, case.params, case.batch_u, case.temperature)
    arguments = (case.opt_state, case.params, case.preconditioner, case.max_grad_norm)
    fast, slow = fx.adamw_decompose(reference.add(rows), *arguments), reference.adamw(rows, *arguments)
    for part in ("direction", "momentum", "weight_decay", "gain"):
        for name, x in getattr(slow, part).items():
            assert_close(getattr(fast, part)[name], x)


@given(training=trainings(), preconditioner=st.sampled_from(PRECONDITIONERS))
@settings(max_examples=10)
def test_adamw_decompose_is_pure(training: Training, preconditioner: Preconditioner) -> None:
    grads, state, params = reference.add(training.grads), training.state, training.params
    given_values = (grads, state, params)
    before = copy.deepcopy(given_values)
    first = fx.adamw_decompose(grads, state, params, preconditioner, training.max_grad_norm)
    second = fx.adamw_decompose(grads, state, params, preconditioner, training.max_grad_norm)
    for a, b in zip(first[:-1], second[:-1], strict=True):
        assert_same(a, b, 0.0)
    trees: list[Mapping[str, Any]] = [grads, *state[:3], params]
    copies: list[Mapping[str, Any]] = [before[0], *before[1][:3], before[2]]
    for old, new in zip(copies, trees, strict=True):
        assert old.keys() == new.keys()
        assert all(x is None if (y := new[name]) is None else torch.equal(x, y) for name, x in old.items())
    assert before[1][3:] == state[3:]


def test_adamw_decompose_drops_autograd_history() -> None:
    grads, state, params = warm_state()
    live = {name: p.clone().requires_grad_() for name, p in params.items()}
    step = fx.adamw_decompose(grads, state, live)
    assert not any(x.requires_grad for part in step[:-1] for x in part.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_parameters_step_in_float32(dtype: torch.dtype) -> None:
    grads, state, params = warm_state()
    low = {name: p.to(dtype) for name, p in params.items()}
    given_grads = {name: None if g is None else g.float() for name, g in grads.items()}
    moments = [{name: x.float() for name, x in part.items()} for part in state[:2]]
    given_state = AdamWState._make([*moments, *state[2:]])
    step = fx.adamw_decompose(given_grads, given_state, low, max_grad_norm=0.5)
    exact = fx.adamw_decompose(grads, state, {name: p.double() for name, p in low.items()}, max_grad_norm=0.5)
    for name, x in step.direction.items():
        assert x.dtype == torch.float32
        assert_close_to_rounding(x, exact.direction[name], terms=STEP)
