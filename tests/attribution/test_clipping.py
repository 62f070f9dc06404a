"""``influence(clip="differentiated")``: the derivative of a clipped step with respect to the weight of a rollout."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, assert_close, make_apply, random_adamw_state, random_batch
from helpers.present import present
from helpers.strategies import VOCAB, WIDTH, Case, cases, influence_options
from helpers.tolerances import TINY_POLICY, assert_within, central_difference
from hypothesis import given
from torch import Tensor

import fx_influence as fx
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.core.tree import dot
from fx_influence.testing import reference

MAX_NORM = 1e-3
CLIPPED = {"clip": "differentiated", "max_grad_norm": MAX_NORM}


class Step:
    """A small policy's step, which ``max_grad_norm`` clips: ``call(**options)`` attributes it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.apply, self.params = make_apply(TinyPolicy(VOCAB, 6, 1, 2, WIDTH))
        self.u = random_batch(generator, 6, WIDTH, VOCAB, coefficients=True)
        self.e = random_batch(generator, 8, WIDTH, VOCAB, groups=8, coefficients=False)
        self.state = random_adamw_state(generator, self.params)

    def call(self, **options: Any) -> fx.Influence:
        return fx.influence(self.params, self.u, self.e, self.state, apply=self.apply, **{**CLIPPED, **options})


@pytest.fixture(scope="module")
def step() -> Step:
    return Step()


@given(case=cases())
def test_differentiated_clip_matches_the_formula(case: Case) -> None:
    """It is delta_i less the share of g_i in the norm, and delta_i where the step does not clip."""
    if case.preconditioner == "rmsprop":
        return
    arguments = (case.params, case.batch_u, case.batch_e, case.opt_state)
    options = influence_options(case)
    frozen = fx.influence(*arguments, **options)
    out = fx.influence(*arguments, **options, clip="differentiated")
    rows = reference.sequence_gradients(case.apply, case.params, case.batch_u, case.temperature)
    g = reference.add(rows)
    norm = reference.inner(g, g) ** 0.5
    clips = case.max_grad_norm is not None and norm + 1e-6 > case.max_grad_norm
    shares = torch.tensor(
        [reference.inner(g, row) / (norm * (norm + 1e-6)) if clips else 0.0 for row in rows], dtype=torch.float64
    )
    expected = frozen.per_sequence - frozen.per_sequence.sum() * shares
    size = float(frozen.per_sequence.abs().sum() + frozen.baseline.abs())
    assert_close(out.per_sequence, expected, size)
    assert_close(present(out.per_token).sum(-1), expected, size)
    assert_close(out.total, frozen.total, size)
    assert_close(out.baseline + out.per_sequence.sum(), out.total, size)


def test_differentiated_clip_is_the_derivative_of_the_step(step: Step) -> None:
    """Denominators are differentiated too."""
    out = step.call(preconditioner="jacobian", stderr=False)
    rows = rollout_gradients(step.params, step.u, step.apply)
    grad_h = reference.add(reference.entropy_gradients(step.apply, step.params, step.e))

    def along_step(weights: Tensor) -> Tensor:
        grads = {name: torch.tensordot(weights, g, 1) for name, g in rows.items()}
        v = fx.adamw_decompose(grads, step.state, step.params, max_grad_norm=MAX_NORM).direction
        return dot(v, {name: present(x) for name, x in grad_h.items()})

    def weighted(unit: Tensor, x: float) -> Tensor:
        return along_step(1 + x * unit)

    for unit, delta in zip(torch.eye(len(out.per_sequence), dtype=torch.float64), out.per_sequence, strict=True):
        slope, bound = central_difference(partial(weighted, unit), 1e-4, terms=TINY_POLICY)
        assert_within(delta, slope, bound)


@pytest.mark.parametrize("options", [{}, {"per_token": False}, {"grad": True}, {"memory_budget": 0}], ids=str)
def test_clipped_influences_add_up_to_zero(step: Step, options: dict[str, Any]) -> None:
    if "grad" in options:
        options = {"grad": batch_gradient(step.params, step.u, step.apply)}
    out, frozen = step.call(**options), step.call(clip="frozen")
    g = reference.add(reference.sequence_gradients(step.apply, step.params, step.u))
    left = 1e-6 / (reference.inner(g, g) ** 0.5 + 1e-6)
    size = float(frozen.per_sequence.abs().sum() + frozen.baseline.abs())
    assert float(out.per_sequence.abs().sum()) > 0.01 * float(frozen.per_sequence.abs().sum())
    assert_close(out.per_sequence.sum(), left * frozen.per_sequence.sum(), size)
    assert_close(out.baseline + out.per_sequence.sum(), out.total, size)
    assert_close(out.total, frozen.total, size)


@pytest.mark.parametrize("options", [{"matrix": True}, {"preconditioner": "rmsprop"}, {"clip": "follow"}], ids=str)
def test_influence_refuses_a_clip_that_it_lacks(step: Step, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^clip is .*; expected "):
        step.call(**options)
