"""The gradient before clipping, read from the clipped one without a copy."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import TinyPolicy, make_apply, random_adamw_state, random_direction
from helpers.strategies import PRECONDITIONERS
from helpers.tolerances import assert_close_to_rounding
from torch import Tensor

import fx_influence as fx
from fx_influence.core.tree import Direction, dot
from fx_influence.optim.clipping import UnclippedGradient, clip_factor
from fx_influence.optim.step import AdamWStep

FACTOR, TERMS = 0.3, 12


def gradients_of(params: fx.Params) -> tuple[dict[str, Tensor | None], UnclippedGradient]:
    """Return a gradient that is None for one parameter, and the same from its clipped tensors."""
    before: dict[str, Tensor | None] = {**random_direction(torch.Generator().manual_seed(1), params)}
    before["norm.weight"] = None
    return before, UnclippedGradient({name: None if g is None else FACTOR * g for name, g in before.items()}, FACTOR)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_step_of_unclipped_gradient_is_the_step(preconditioner: fx.types.Preconditioner) -> None:
    """Every term of the step, and its products, are those with the gradient before clipping, to two roundings more."""
    _, params = make_apply(TinyPolicy(5, 4, 1, 2, 6))
    opt_state = random_adamw_state(torch.Generator().manual_seed(3), params)
    before, unclipped = gradients_of(params)
    bound = 0.5 * float(torch.cat([g.flatten() for g in before.values() if g is not None]).norm())
    expected, step = (AdamWStep.of(g, opt_state, params, preconditioner, bound) for g in (before, unclipped))  # type: ignore[arg-type]
    for actual, other in ((step.gain(), expected.gain()), (step.baseline(), expected.baseline())):
        for name, v in actual.items():
            assert_close_to_rounding(v, other[name], terms=TERMS, scale=other[name].abs().max())
    u = Direction.of_(random_direction(torch.Generator().manual_seed(2), params))
    products = expected.update_products(u)
    for name, value in step.update_products(u).items():
        assert_close_to_rounding(value, products[name], terms=TERMS * 100, scale=1 + products[name].abs())
    sampled = step.sample(3).direction()
    for name, v in expected.sample(3).direction().items():
        assert_close_to_rounding(sampled[name], v, terms=TERMS, scale=v.abs().max())


def test_clip_factor_is_of_the_gradient_before_clipping() -> None:
    _, params = make_apply(TinyPolicy(5, 4, 1, 2, 6))
    before, unclipped = gradients_of(params)
    norm = float(torch.cat([g.flatten() for g in before.values() if g is not None]).norm())
    kappa = clip_factor(unclipped, FACTOR * norm, params)
    assert_close_to_rounding(kappa, torch.tensor(FACTOR), terms=1000)
    with pytest.raises(ValueError, match="norm inf"):
        clip_factor(UnclippedGradient({"w": torch.tensor([torch.inf])}, FACTOR), None, {"w": torch.zeros(1)})


def test_entries_are_divided_at_access() -> None:
    stored = {"w": torch.tensor([1.0, 2.0])}
    gradient = UnclippedGradient({**stored}, 0.5)
    stored["w"].mul_(3.0)
    assert [None if g is None else g.tolist() for g in gradient.values()] == [[6.0, 12.0]]
    assert dot(gradient, {"w": torch.ones(2)}) == 18.0


def test_differentiated_clipping_reads_the_clipped_gradient() -> None:
    _, params = make_apply(TinyPolicy(5, 4, 1, 2, 6))
    opt_state = random_adamw_state(torch.Generator().manual_seed(3), params)
    before, unclipped = gradients_of(params)
    norm = float(torch.cat([g.flatten() for g in before.values() if g is not None]).norm())
    expected, x = (random_direction(torch.Generator().manual_seed(2), params) for _ in range(2))
    removed = AdamWStep.of(before, opt_state, params, "frozen", FACTOR * norm).differentiate_clipping_(expected)
    step = AdamWStep.of(unclipped, opt_state, params, "frozen", FACTOR * norm)  # type: ignore[arg-type]
    assert_close_to_rounding(step.differentiate_clipping_(x), removed, terms=1000, scale=1 + removed.abs())
    for name, v in expected.items():
        assert_close_to_rounding(x[name], v, terms=1000, scale=1 + v.abs().max())
