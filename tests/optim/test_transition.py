"""AdamW's step as a map of the training state, and its transpose, against autograd and real steps of the optimizer."""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple

import pytest
import torch
from helpers.strategies import seeds
from helpers.tolerances import assert_close_to_rounding, assert_within, central_difference
from helpers.trainings import LOST, STEP, Training, trainings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fx_influence.core.tree import dot
from fx_influence.optim.step import AdamWStep
from fx_influence.optim.transition import StateCotangent, TransposedStep, advance, transpose_
from fx_influence.testing import reference
from fx_influence.types import AdamWHyper, AdamWState, Clip, Gradients, Params

Fixed = Literal["frozen", "jacobian"]


class Point(NamedTuple):
    """The inputs of one step, by name; ``maximum`` has the amsgrad parameters alone."""

    theta: Params
    m: Params
    s: Params
    maximum: Params
    g: Gradients

    @classmethod
    def of(cls, training: Training) -> Point:
        state = training.state
        return cls(
            training.params, state.exp_avg, state.exp_avg_sq, state.max_exp_avg_sq, reference.add(training.grads)
        )


def step_of(training: Training, preconditioner: Fixed = "jacobian") -> AdamWStep:
    g = reference.add(training.grads)
    return AdamWStep.of(g, training.state, training.params, preconditioner, training.max_grad_norm)


def random_cotangent(training: Training, seed: int) -> StateCotangent:
    """Return normal cotangents of the state after the step; those of theta are divided by lr, to be seen beside it."""
    generator, point = torch.Generator().manual_seed(seed), Point.of(training)
    return StateCotangent(
        *(
            {name: torch.randn(x.shape, generator=generator, dtype=torch.float64) / scale for name, x in field.items()}
            for field, scale in zip(point[:4], (training.lr, 1.0, 1.0, 1.0), strict=True)
        )
    )


def plain_step(
    theta: Tensor, m: Tensor, s: Tensor, top: Tensor | None, ghat: Tensor, hyper: AdamWHyper, tau: int, lr: float
) -> tuple[Tensor, ...]:
    """AdamW as its paper writes it, for autograd: the square root of 0 has derivative 0."""
    ghat = -ghat if hyper.maximize else ghat
    m, s = hyper.beta1 * m + (1 - hyper.beta1) * ghat, hyper.beta2 * s + (1 - hyper.beta2) * ghat**2
    highest = s if top is None else torch.where(s > top, s, top)
    safe = torch.where(highest > 0, highest, 1.0)
    root = torch.where(highest > 0, (safe / (1 - hyper.beta2**tau)).sqrt(), 0.0)
    theta = theta - lr * hyper.lr_scale * hyper.weight_decay * theta
    theta = theta - lr * hyper.lr_scale * m / (1 - hyper.beta1**tau) / (root + hyper.eps)
    return (theta, m, s) if top is None else (theta, m, s, highest)


def transposed(
    step: AdamWStep, lr: float, after: StateCotangent, clip: Clip = "frozen"
) -> tuple[TransposedStep, StateCotangent]:
    """Return what ``transpose_`` does and the cotangent of the state before the step; that after it stays."""
    before = StateCotangent({**after.theta}, {**after.m}, {**after.s}, {**after.maximum})
    return transpose_(step, lr, before, clip), before


def by_autograd(training: Training, after: StateCotangent, clip: Clip) -> Point:
    """Return the cotangents of the state before the step and of the gradient, by autograd through ``plain_step``."""
    point = Point.of(training)
    theta, m, s, maximum, g = (
        {name: x.clone().requires_grad_() for name, x in field.items() if x is not None} for field in point
    )
    leaves = (theta, m, s, maximum, g)
    state = training.state
    norm = torch.stack([x.square().sum() for x in g.values()]).sum().sqrt()
    kappa = torch.ones(()) if training.max_grad_norm is None else (training.max_grad_norm / (norm + 1e-6)).clamp(max=1)
    kappa = kappa.detach() if clip == "frozen" else kappa
    total = torch.zeros((), dtype=torch.float64)
    for name, p in theta.items():
        cotangents = [field[name] for field in (after.theta, after.m, after.s, after.maximum) if name in field]
        if name not in g or name not in state.hyper:
            outputs = [field[name] for field in (theta, m, s, maximum) if name in field]
        else:
            moments = (m[name], s[name], maximum.get(name))
            outputs = [*plain_step(p, *moments, kappa * g[name], state.hyper[name], state.step[name] + 1, training.lr)]
        total = total + sum((x * y).sum() for x, y in zip(cotangents, outputs, strict=True))
    flat = [(k, name, x) for k, field in enumerate(leaves) for name, x in field.items()]
    grads = torch.autograd.grad(total, [x for _, _, x in flat], allow_unused=True)
    result = Point({}, {}, {}, {}, {})
    fields = (result.theta, result.m, result.s, result.maximum, result.g)
    for (k, name, x), grad in zip(flat, grads, strict=True):
        fields[k][name] = torch.zeros_like(x) if grad is None else grad
    return result


@given(training=trainings())
@settings(max_examples=40)
def test_advance_matches_torch_adamw(training: Training) -> None:
    params, state = advance(step_of(training), training.lr)
    model, optimizer = copy.deepcopy((training.model, training.optimizer))
    for name, p in model.named_parameters():
        p.grad = reference.add(training.grads)[name]
    if training.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
    optimizer.step()
    after = training._replace(model=model, optimizer=optimizer)
    assert state.step == after.state.step
    pairs = [(params, after.params), *zip(state[:3], after.state[:3], strict=True)]
    for actual, expected in pairs:
        assert actual.keys() == expected.keys()
        for name, x in actual.items():
            assert_close_to_rounding(x, expected[name], terms=STEP, scale=1 + expected[name].abs(), name=name)


@given(training=trainings(), seed=seeds, clip=st.sampled_from(["frozen", "differentiated"]))
@settings(max_examples=40)
def test_transpose_matches_autograd(training: Training, seed: int, clip: Clip) -> None:
    after = random_cotangent(training, seed)
    actual, before = transposed(step_of(training), training.lr, after, clip)
    expected, fields = by_autograd(training, after, clip), (before.theta, before.m, before.s, before.maximum)
    for field, other in zip(fields, expected[:4], strict=True):
        assert field.keys() == other.keys()
        for name, x in field.items():
            assert_close_to_rounding(x, other[name], terms=STEP, scale=LOST * (1 + other[name].abs()), name=name)
    for name, g in expected.g.items():
        assert g is not None
        mine = actual.g.get(name, torch.zeros_like(g))
        assert_close_to_rounding(mine, g, terms=STEP, scale=LOST * (1 + g.abs()), name=name)


def directional(out: TransposedStep, before: StateCotangent, v: Point) -> Tensor:
    pairs = zip((before.theta, before.m, before.s, before.maximum), v[:4], strict=True)
    return torch.stack(
        [dot(out.g, {n: x for n, x in v.g.items() if x is not None}), *(dot(a, b) for a, b in pairs if b)]
    ).sum()


def moved(training: Training, v: Point, eta: float, kappa: Tensor | None, after: StateCotangent) -> Tensor:
    """Return <after, state> after a real step from the state moved by eta v; ``kappa`` stands in for clipping."""
    model, optimizer = copy.deepcopy((training.model, training.optimizer))
    names = {p: name for name, p in model.named_parameters()}
    grads = reference.add(training.grads)
    for p, name in names.items():
        g, d_g = grads[name], v.g[name]
        p.grad = None if g is None or d_g is None else (g + eta * d_g) * (1 if kappa is None else kappa)
        p.data.add_(v.theta[name], alpha=eta)
        for key, field in (("exp_avg", v.m), ("exp_avg_sq", v.s), ("max_exp_avg_sq", v.maximum)):
            if key in optimizer.state.get(p, {}):
                optimizer.state[p][key].add_(field[name], alpha=eta)
    if kappa is None and training.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
    optimizer.step()
    moments = training._replace(model=model, optimizer=optimizer).state[:3]
    fields = zip(vars(after).values(), ({n: p.detach() for p, n in names.items()}, *moments), strict=True)
    return torch.stack([dot(values, cotangent) for cotangent, values in fields if cotangent]).sum()


@given(training=trainings(), seed=seeds, clip=st.sampled_from(["frozen", "differentiated"]))
@settings(max_examples=40)
def test_transpose_matches_finite_differences(training: Training, seed: int, clip: Clip) -> None:
    """Second moments and gradients move in proportion to their size, so that none changes its sign."""
    after, step, generator = random_cotangent(training, seed), step_of(training), torch.Generator().manual_seed(seed)

    def normal(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64)

    point = Point.of(training)
    v = Point(
        {n: normal(x) for n, x in point.theta.items()},
        {n: normal(x) * (point.s[n] > 0) for n, x in point.m.items()},
        {n: normal(x) * x for n, x in point.s.items()},
        {n: normal(x) * x for n, x in point.maximum.items()},
        {n: None if x is None else normal(x) * x for n, x in point.g.items()},
    )
    kappa = step.clip if clip == "frozen" else None
    size = sum(float((abs(x) * (1 + training.params[n].abs())).sum()) for n, x in after.theta.items())
    slope = central_difference(
        lambda eta: moved(training, v, eta, kappa, after), 1e-4, terms=STEP, magnitude=LOST * size
    )
    assert_within(directional(*transposed(step, training.lr, after, clip), v), slope.slope, slope.bound)


@given(training=trainings(), seed=seeds)
@settings(max_examples=40)
def test_step_scales_with_gradients_and_moments(training: Training, seed: int) -> None:
    """A step from (a m, a^2 s, a g) with a eps is the same step, so these derivatives add up to 0 (Euler)."""
    after = random_cotangent(training, seed)
    (out, start), point = transposed(step_of(training), training.lr, after), Point.of(training)
    m, s, maximum = advance(step_of(training), training.lr)[1][:3]
    before = dot(start.m, point.m) + 2 * dot(start.s, point.s) + dot(out.g, _reached(point, out.g)) + out.eps
    end = dot(after.m, m) + 2 * dot(after.s, s)
    if point.maximum:
        before, end = before + 2 * dot(start.maximum, point.maximum), end + 2 * dot(after.maximum, maximum)
    pairs = ((out.g, _reached(point, out.g)), (start.s, point.s))
    size = 1 + abs(float(end)) + sum(float((x * b[n]).abs().sum()) for a, b in pairs for n, x in a.items())
    assert_close_to_rounding(before, end, terms=STEP, scale=LOST * size)


def _reached(point: Point, names: Params) -> Params:
    return {n: x for n, x in point.g.items() if x is not None and n in names}


@given(training=trainings(), preconditioner=st.sampled_from(["frozen", "jacobian"]))
@settings(max_examples=40)
def test_transpose_of_a_function_of_theta_is_lr_times_gain(training: Training, preconditioner: Fixed) -> None:
    step = step_of(training, preconditioner)
    ones = {name: torch.ones_like(p) for name, p in training.params.items()}
    out, before = transposed(step, training.lr, StateCotangent.of_parameters(ones, training.state))
    for name, gain in step.gain().items():
        assert_close_to_rounding(
            out.g.get(name, torch.zeros_like(gain)),
            training.lr * gain,
            terms=STEP,
            scale=LOST * training.lr * gain.abs(),
        )
    if preconditioner == "frozen":
        assert not any(x.any() for x in (*before.s.values(), *before.maximum.values()))


def test_step_without_gradients_moves_nothing() -> None:
    one = {"w": torch.ones(2, dtype=torch.float64)}
    state = AdamWState(one, one, {}, {"w": 3}, {"w": AdamWHyper(weight_decay=0.1)}, lr=0.1)
    step = AdamWStep.of({"w": None}, state, one, "jacobian", 0.1)
    params, after = advance(step, 0.1)
    assert torch.equal(params["w"], one["w"])
    assert after.step == {"w": 3}
    out, before = transposed(step, 0.1, StateCotangent(one, one, one, {}), "differentiated")
    assert not out.g
    assert torch.equal(before.theta["w"], one["w"])


@pytest.mark.parametrize("clip", ["frozen", "differentiated"])
def test_clipping_reaches_parameters_that_the_optimizer_lacks(clip: Clip) -> None:
    """Their gradient is in the norm, so a differentiated clip has a derivative with respect to it."""
    values = {"a": torch.tensor([3.0], dtype=torch.float64), "b": torch.tensor([4.0], dtype=torch.float64)}
    a = {"a": torch.ones(1, dtype=torch.float64)}
    state = AdamWState(a, a, {}, {"a": 3}, {"a": AdamWHyper()}, lr=0.1)
    step = AdamWStep.of({**values}, state, values, "jacobian", 1.0)
    out, _ = transposed(step, 0.1, StateCotangent(values, a, a, {}), clip)
    assert ("b" in out.g) == (clip == "differentiated")
