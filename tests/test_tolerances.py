"""Rounding bounds cover the errors of rounding, and are below the faults that tests look for."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import TinyPolicy, make_apply, random_batch
from helpers.strategies import VOCAB, WIDTH
from helpers.tolerances import (
    ROOM,
    TINY_POLICY,
    assert_close_to_rounding,
    assert_within,
    central_curvature,
    central_difference,
    exact_bound,
    policy_terms,
    rounding_bound,
)

import fx_influence as fx

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def sequential_sum(x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=x.dtype)
    for value in x:
        total = total + value
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 64, 1000])
def test_rounding_bound_covers_sum_in_any_order(dtype: torch.dtype, n: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    bound = rounding_bound(dtype, n, x.double().abs().sum())
    for order in (x, x.flip(0), x.sort().values, x[x.abs().argsort()]):
        assert_within(sequential_sum(order), x.double().sum(), bound)


def test_rounding_bound_is_below_a_lost_term() -> None:
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5
    with pytest.raises(AssertionError, match="lost"):
        assert_close_to_rounding(x[1:].sum(), x.double().sum(), terms=1000, name="lost")
    assert rounding_bound(torch.float32, 1000, x.sum()) < 0.1 * x.min()


def test_rounding_bound_is_the_worst_case_to_100_terms() -> None:
    for terms in (1, 10, 100):
        assert rounding_bound(torch.float64, terms) >= terms * torch.finfo(torch.float64).eps
    assert rounding_bound(torch.float32, 4, torch.tensor([1.0, -3.0])) == ROOM * 2**-23 * 2 * 3
    assert rounding_bound(torch.float32, 4, torch.zeros(0)) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_policy_terms_bounds_policy_and_gradients(dtype: torch.dtype) -> None:
    apply, params = make_apply(TinyPolicy(layers=2))
    batch = random_batch(torch.Generator().manual_seed(0), 3, 12, 7)
    low = {name: p.detach().to(dtype) for name, p in params.items()}
    exact = {name: p.double() for name, p in low.items()}
    ours, theirs = (apply(p, batch.input_ids, batch.attention_mask) for p in (low, exact))
    assert_close_to_rounding(ours, theirs, terms=policy_terms(low, 12, 1))
    grads, exact_grads = (fx.per_sample_grads(fx.rollout_loss(apply), p, batch) for p in (low, exact))
    size = torch.stack([g.abs().max() for g in exact_grads.values()])
    for name, g in grads.items():
        assert_close_to_rounding(g, exact_grads[name], terms=policy_terms(low, 12, 2), scale=size, name=name)


def test_tiny_policy_is_as_deep_as_the_tests_policies() -> None:
    widest = max(
        policy_terms(make_apply(model)[1], width)
        for model, width in ((TinyPolicy(layers=2), 12), (TinyPolicy(VOCAB, 6, 2, 2, WIDTH), WIDTH))
    )
    assert 0.3 * TINY_POLICY < widest <= TINY_POLICY


def test_assert_close_to_rounding_uses_coarser_dtype_and_nan() -> None:
    nan, infinite = float("nan"), float("inf")
    low = torch.tensor([0.1, nan, infinite])
    assert_close_to_rounding(low, torch.tensor([0.1, nan, infinite], dtype=torch.float64), terms=1)
    with pytest.raises(AssertionError):
        assert_close_to_rounding(low.double(), torch.tensor([0.1, nan, infinite], dtype=torch.float64), terms=1)
    with pytest.raises(AssertionError):
        assert_close_to_rounding(low, torch.tensor([0.1, 0.0, infinite]), terms=1)
    with pytest.raises(AssertionError, match="shapes"):
        assert_close_to_rounding(low, low[:2], terms=1)
    assert_close_to_rounding(0.1 + 0.2, 0.3, terms=1)
    with pytest.raises(AssertionError):
        assert_close_to_rounding(0.3 + 1e-12, 0.3, terms=1)


def test_exact_bound_follows_error_and_is_never_zero() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    rounded = exact.float() + torch.tensor([0.0, 1e-3])
    assert exact_bound(rounded, exact) == pytest.approx(ROOM * 1e-3, rel=1e-3)
    assert exact_bound(exact.float(), exact) == rounding_bound(torch.float32, 1, 2.0)


@pytest.mark.parametrize("width", [1e-2, 1e-4])
def test_central_difference_bounds_truncation_and_rounding(width: float) -> None:
    points = torch.tensor([0.3, 1.2], dtype=torch.float64)
    slope, bound = central_difference(lambda h: (points + h).exp(), width, terms=3)
    assert_within(slope, points.exp(), bound)
    assert bound < 1e-3


@pytest.mark.parametrize("width", [1e-2, 1e-3])
def test_central_curvature_bounds_truncation_and_rounding(width: float) -> None:
    points = torch.tensor([0.3, 1.2], dtype=torch.float64)
    curvature, bound = central_curvature(lambda h: (points + h).exp(), width, terms=3)
    assert_within(curvature, points.exp(), bound)
    assert bound < 1e-3
