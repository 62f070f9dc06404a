"""Warm AdamW optimizers of torch drawn at random, the steps that they really make, and comparisons with these."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fx_influence as fx
from fx_influence.testing import reference
from fx_influence.types import AdamWState, Gradients, Params, Preconditioner
from helpers.cases import TinyPolicy, make_apply, random_adamw_state, random_batch
from helpers.strategies import seeds
from helpers.tolerances import assert_close_to_rounding

Warm = tuple[Gradients, AdamWState, Params]
"""A policy's gradient, a warm state, and its parameters."""

# What the optimizers here are built with, and which no step may see: their param_groups are changed afterwards.
DEFAULTS: dict[str, Any] = {
    "lr": 7.0,
    "betas": (0.11, 0.22),
    "eps": 3.0,
    "weight_decay": 5.0,
    "amsgrad": False,
    "maximize": False,
}


class Training(NamedTuple):
    """A warm optimizer over ``model`` (an ``nn.ParameterDict``), and the next batch's gradients by sequence.

    The last parameter is held by no group; ``unreached`` has no gradient. Coordinate 0 of every parameter has never
    had a gradient other than 0.
    """

    model: nn.ParameterDict
    optimizer: torch.optim.AdamW
    grads: list[Gradients]
    max_grad_norm: float | None

    @property
    def params(self) -> Params:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @property
    def state(self) -> AdamWState:
        return fx.adamw_state(self.optimizer, self.model)

    @property
    def lr(self) -> float:
        return next(group["lr"] for group in self.optimizer.param_groups if group["lr"])

    def decompose(self, preconditioner: Preconditioner = "frozen") -> fx.AdamWDecomposition:
        return fx.adamw_decompose(
            reference.add(self.grads), self.state, self.params, preconditioner, self.max_grad_norm
        )


group_settings = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.5, 0.02, 1e-3]),
        "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.3, 0.95, 0.999])),
        "eps": st.sampled_from([1e-8, 1e-3, 0.1]),
        "weight_decay": st.sampled_from([0.0, 0.1, 0.7]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    }
)


@st.composite
def trainings(draw: st.DrawFn) -> Training:
    """Draw two param_groups unlike each other (the first lr may be 0), state of real steps, and a clip or none."""
    generator = torch.Generator().manual_seed(draw(seeds))

    def normal(shape: tuple[int, ...], size: float = 1.0) -> Tensor:
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    def gradient(shape: tuple[int, ...], size: float) -> Tensor:
        g = normal(shape, size)
        g.flatten()[0] = 0.0
        return g

    shapes = draw(st.lists(st.sampled_from([(3,), (2, 3), (2, 1, 2), (5,)]), min_size=4, max_size=6))
    model = nn.ParameterDict({f"p{i}": nn.Parameter(normal(shape)) for i, shape in enumerate(shapes)})
    in_optimizer = list(model.values())[:-1]
    optimizer = torch.optim.AdamW([{"params": in_optimizer[0::2]}, {"params": in_optimizer[1::2]}], **DEFAULTS)
    for group in optimizer.param_groups:
        group.update(draw(group_settings))
    warm_size = draw(st.sampled_from([0.1, 1.0, 20.0]))
    for step in range(draw(st.integers(0, 4))):
        for i, p in enumerate(in_optimizer):
            # Parameter 0 misses the first step, so step counts differ.
            p.grad = None if (step, i) == (0, 0) else gradient(p.shape, warm_size)
        optimizer.step()
    if draw(st.booleans()):
        optimizer.param_groups[0]["lr"] = 0.0
    unreached = draw(st.sampled_from([None, "p1"]))
    grads: list[Gradients] = [
        {name: None if name == unreached else gradient(p.shape, 1.0) for name, p in model.items()}
        for _ in range(draw(st.integers(1, 4)))
    ]
    return Training(model, optimizer, grads, draw(st.sampled_from([None, 0.3, 1e3])))


def real_step(training: Training, grads: Gradients, max_grad_norm: float | None, at_zero: bool = False) -> Params:
    """Return (theta' - theta) / lr_ref of the optimizer's next step, made on a copy; ``at_zero``: from theta = 0."""
    model, optimizer = copy.deepcopy((training.model, training.optimizer))
    for name, p in model.named_parameters():
        p.data.mul_(0.0 if at_zero else 1.0)
        g = grads[name]
        p.grad = None if g is None else g.clone()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return {name: (p.detach() - before[name]) / training.lr for name, p in model.named_parameters()}


# Roundings of one coordinate's step; 1 - beta^step of the betas here may have lost three digits, and den has its root.
STEP, LOST = 100, 1e3


def assert_same(actual: Params, expected: Params, scale: float = LOST) -> None:
    """Check equality to the rounding of a step of AdamW of ``scale`` times each entry; bit for bit at 0."""
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert_close_to_rounding(x, expected[name], terms=STEP, scale=scale * expected[name].abs(), name=name)


def assert_made(actual: Params, training: Training, step: Params) -> None:
    """Check equality to a real step: theta' - theta carries the rounding of theta, and is divided by lr."""
    moved = max(float(p.abs().max()) for p in training.params.values()) / training.lr
    for name, x in step.items():
        size = moved + LOST * float(x.abs().max())
        assert_close_to_rounding(actual[name], x, terms=STEP, scale=size, name=name)


def add_gradient(a: Params, gain: Params, g: Gradients) -> Params:
    """Return a + gain * g, where None adds nothing."""
    return {name: x if (y := g[name]) is None else x + gain[name] * y for name, x in a.items()}


def warm_state() -> Warm:
    """Return the gradient, a warm random state and the parameters of a small policy."""
    generator = torch.Generator().manual_seed(0)
    apply, params = make_apply(TinyPolicy(5, 4, 1, 2, 6))
    rows = reference.sequence_gradients(apply, params, random_batch(generator, 3, 6, 5))
    return reference.add(rows), random_adamw_state(generator, params), params
