"""``AdamWStep`` against the vectors of ``adamw_decompose``, at whatever hyperparameters, state and layout."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import TinyPolicy, make_apply, random_adamw_state, random_direction
from helpers.strategies import PRECONDITIONERS
from helpers.tolerances import assert_close_to_rounding
from torch import Tensor

import fx_influence as fx
from fx_influence.core.tree import Direction, dot, every_nth, multiply
from fx_influence.optim import step as step_module
from fx_influence.optim.step import AdamWStep, add_inner_products

TERMS = 12
"""Operations in a row that make one entry of a step."""


def gradient_of(params: fx.Params, seed: int) -> dict[str, Tensor | None]:
    """Return a gradient that is None for one parameter and has one that the state below does not hold."""
    return {**random_direction(torch.Generator().manual_seed(seed), params), "norm.weight": None}


@pytest.fixture(
    params=[{}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.3}, {"rounded": True, "weight_decay": 0.3}],
    ids=str,
)
def state(request: pytest.FixtureRequest) -> tuple[fx.Params, fx.AdamWState]:
    """Return parameters and a state; ``rounded``: parameters rounded to bfloat16, master weights in the state."""
    options = dict(request.param)
    rounded = options.pop("rounded", False)
    _, params = make_apply(TinyPolicy(5, 4, 1, 2, 6))
    generator = torch.Generator().manual_seed(3)
    opt_state = random_adamw_state(generator, params, absent=("head.bias",), **options)
    if not rounded:
        return params, opt_state
    masters = {name: p for name, p in params.items() if name in opt_state.hyper}
    return {name: p.bfloat16().to(p.dtype) for name, p in params.items()}, opt_state._replace(master_weights=masters)


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("block", [7, 2**20])
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_step_matches_the_decomposition(
    state: tuple[fx.Params, fx.AdamWState],
    preconditioner: fx.types.Preconditioner,
    block: int,
    max_grad_norm: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of 7 end within rows of every parameter."""
    monkeypatch.setattr(step_module, "CPU_BLOCK", block)
    params, opt_state = state
    grads = gradient_of(params, 1)
    x = random_direction(torch.Generator().manual_seed(2), params)
    step = AdamWStep.of(grads, opt_state, params, preconditioner, max_grad_norm)
    decomposition = fx.adamw_decompose(grads, opt_state, params, preconditioner, max_grad_norm)
    scaled = {name: v.clone() for name, v in x.items()}
    products = step.precondition_(scaled)
    for name in ("direction", "baseline", "momentum", "weight_decay"):
        vector = getattr(decomposition, name)
        size = sum((x[n] * v).abs().sum() for n, v in vector.items())
        assert_close_to_rounding(getattr(products, name), dot(vector, x), terms=TERMS * 1000, scale=size)
    for name, v in step.gain().items():
        assert_close_to_rounding(v, decomposition.gain[name], terms=TERMS, scale=decomposition.gain[name].abs().max())
    for name, v in step.direction().items():
        assert_close_to_rounding(
            v, decomposition.direction[name], terms=TERMS, scale=decomposition.direction[name].abs().max()
        )
    expected_x, update = multiply(decomposition.gain, x), multiply(decomposition.gain, grads)
    expected_products = {name: (v * x[name]).sum().double() for name, v in update.items()}
    for name, v in scaled.items():
        assert_close_to_rounding(v, expected_x[name], terms=TERMS, scale=expected_x[name].abs().max())
    for name, value in step.update_products(Direction.of_(scaled)).items():
        expected = expected_products[name]
        assert_close_to_rounding(value, expected, terms=TERMS * 1000, scale=1 + expected.abs())


def test_step_takes_tensors_that_are_not_contiguous(state: tuple[fx.Params, fx.AdamWState]) -> None:
    params, opt_state = state
    strided = {name: p.T.contiguous().T if p.dim() == 2 else p for name, p in params.items()}
    assert any(not p.is_contiguous() for p in strided.values())
    grads = gradient_of(params, 1)
    one, other = (AdamWStep.of(grads, opt_state, p, "frozen", None).direction() for p in (params, strided))
    for name, v in one.items():
        assert torch.equal(other[name], v)


def test_inner_products_add_up_over_terms(state: tuple[fx.Params, fx.AdamWState]) -> None:
    params, opt_state = state
    step = AdamWStep.of(gradient_of(params, 1), opt_state, params, "frozen", None)
    parts = [random_direction(torch.Generator().manual_seed(seed), params) for seed in (4, 5)]
    total = step.precondition_({name: parts[0][name] + parts[1][name] for name in params})
    added = add_inner_products([step.precondition_(part) for part in parts])
    for a, b in zip(total, added, strict=True):
        assert_close_to_rounding(b, a, terms=TERMS * 1000, scale=1 + a.abs())


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_sample_of_the_step_is_the_step_of_the_sample(
    state: tuple[fx.Params, fx.AdamWState], preconditioner: fx.types.Preconditioner
) -> None:
    params, opt_state = state
    step = AdamWStep.of(gradient_of(params, 4), opt_state, params, preconditioner, 0.1)
    expected = every_nth(step.direction(), 3)
    sample = step.sample(3)
    for tensors in (opt_state.exp_avg, opt_state.master_weights or {}):
        for x in tensors.values():
            x.zero_()
    for name, v in sample.direction().items():
        assert torch.equal(v, expected[name]), name
