"""Weights of kinds: feasible, at the most sure reward, 1 where nothing is sure, and the fallback."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import chi2, t
from torch import Tensor

import fx_influence as fx
from fx_influence.control import ControlState, ControlWeights, KindSums
from fx_influence.control.program import TOLERANCE

LR = 1e-3
BOUNDS = (0.0, 1.5)
quarters = st.integers(-20, 20).map(lambda k: k / 4)
pairs_of_kinds = st.lists(st.tuples(quarters, quarters), min_size=1, max_size=5)


def state_of(delta: Tensor, r: Tensor, c: Tensor | None = None, reward_c: Tensor | None = None) -> ControlState:
    """Return the state after one step of exact degrees of freedom; None is an error of 0."""
    zero = torch.zeros(len(delta), len(delta), dtype=torch.float64)
    kinds = tuple(f"kind {k}" for k in range(len(delta)))
    rest = torch.zeros((), dtype=torch.float64)
    sums = KindSums(kinds, delta, r, zero if c is None else c, zero if reward_c is None else reward_c, rest)
    return fx.control.update(fx.control.control_state(), sums, forgetting=0.9)


def solve(state: ControlState, floor: float, **options: Any) -> ControlWeights:
    """Return the weights whose change per unit lr is to be at least ``floor``."""
    return fx.control.weights(state, 1.0, 1.0 + floor * 10 * LR, **{"lr": LR, "bounds": BOUNDS, **options})


def vectors(pairs: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    delta, r = torch.tensor(pairs, dtype=torch.float64).T
    return delta, r


def scale(delta: Tensor) -> float:
    return 20 * TOLERANCE * len(delta) * (1 + float(delta.abs().max()))


@settings(max_examples=25)
@given(pairs_of_kinds, quarters)
def test_weights_meet_floor_within_bounds(pairs: list[tuple[float, float]], floor: float) -> None:
    delta, r = vectors(pairs)
    out = solve(state_of(delta, r), floor)
    assert ((out.weights >= BOUNDS[0]) & (out.weights <= BOUNDS[1])).all()
    largest = float(torch.where(delta > 0, BOUNDS[1] * delta, BOUNDS[0] * delta).sum())
    if out.reached:
        assert out.entropy >= floor - scale(delta)
    else:
        assert largest < floor + scale(delta)
        assert out.entropy == pytest.approx(largest, abs=scale(delta))
    assert out.entropy == pytest.approx(float(out.weights @ delta))
    assert out.reward == pytest.approx(float(out.weights @ r))


@settings(max_examples=25)
@given(pairs_of_kinds, st.lists(quarters, min_size=2, max_size=2))
def test_weights_are_monotone_in_target(pairs: list[tuple[float, float]], floors: list[float]) -> None:
    delta, r = vectors(pairs)
    low, high = (solve(state_of(delta, r), floor) for floor in sorted(floors))
    if high.reached:
        assert low.reached
        assert high.reward <= low.reward + scale(r)
    assert max(high.entropy, high.floor) >= min(low.entropy, low.floor) - scale(delta)


@settings(max_examples=15)
@given(st.lists(st.tuples(quarters, quarters), min_size=3, max_size=5), quarters, st.permutations(range(3)))
def test_relabelling_kinds_permutes_weights(pairs: list[tuple[float, float]], floor: float, order: list[int]) -> None:
    # Distinct influences, because equal kinds share a weight in any way.
    pairs = [(a + 0.01 * k, b + 0.003 * k**2) for k, (a, b) in enumerate(pairs[:3])]
    delta, r = vectors(pairs)
    c = torch.diag(torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64))
    plain = solve(state_of(delta, r, c, c), floor, confidence=0.1)
    permuted = solve(state_of(delta[order], r[order], c[order][:, order], c[order][:, order]), floor, confidence=0.1)
    assert plain.reached == permuted.reached
    assert plain.entropy_bound == pytest.approx(permuted.entropy_bound, abs=scale(delta)) or plain.reached
    assert plain.reward == pytest.approx(permuted.reward, abs=0.02 + scale(r)) or not plain.reached


@settings(max_examples=20)
@given(st.integers(0, 30), st.floats(0.05, 0.95), st.sampled_from([-5.0, 0.0, 5.0]))
def test_weights_are_one_when_nothing_is_significant(seed: int, share: float, floor: float) -> None:
    """Significant is what is beyond Scheffe's bound; errors are correlated, and 0 reward has errors too."""
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    c, reward_c = (x @ x.T + torch.eye(4, dtype=torch.float64) for x in roots)
    bound = math.sqrt(chi2.ppf(0.8, 4))
    influences = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    delta, r = (
        share * bound * x / (x @ torch.linalg.solve(cov, x)).sqrt()
        for x, cov in zip(influences, (c, reward_c), strict=True)
    )
    out = solve(state_of(delta, r, c, reward_c), floor)
    assert (out.weights - 1).abs().max() < 100 * TOLERANCE
    assert out.reached == (floor < float(delta.sum()))


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.floats(0.0, 0.8))
def test_cutting_planes_solve_the_cone_program(seed: int, part: float) -> None:
    """An interior solver of the same program with its square roots agrees in the objective."""
    generator = torch.Generator().manual_seed(seed)
    delta, r = 3 * torch.randn(2, 4, generator=generator, dtype=torch.float64)
    roots = 0.2 * torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    c, reward_c = (x @ x.T + 1e-3 * torch.eye(4, dtype=torch.float64) for x in roots)
    state, z = state_of(delta, r, c, reward_c), math.sqrt(chi2.ppf(0.8, 4))
    largest = solve(state, 1e3).entropy_bound
    lowest = solve(state, -1e3).entropy_bound
    floor = lowest + part * (largest - lowest)
    out = solve(state, floor)
    assert out.reached

    def sure(mean: Tensor, covariance: Tensor, d: np.ndarray) -> float:
        return float(mean.numpy() @ d - z * math.sqrt(max(float(d @ covariance.numpy() @ d), 0.0) + 1e-14))

    total = float(delta.sum())
    box = [(BOUNDS[0] - 1, BOUNDS[1] - 1)] * 4

    def excess(d: np.ndarray) -> float:
        return total + sure(delta, c, d) - floor

    starts = [0.5 * (out.weights.numpy() - 1), np.zeros(4), out.weights.numpy() - 1]
    tries = [
        minimize(
            lambda d: -sure(r, reward_c, d),
            x,
            method="SLSQP",
            bounds=box,
            constraints=[{"type": "ineq", "fun": excess}],
        )
        for x in starts
    ]
    best = max((-x.fun for x in tries if excess(x.x) > -1e-7), default=-math.inf)
    ours = sure(r, reward_c, out.weights.numpy() - 1)
    assert ours >= best - 1e-3 * (1 + abs(best))
    assert excess(out.weights.numpy() - 1) >= -scale(delta)


def test_error_bars_ask_for_more_than_the_means() -> None:
    delta, r = torch.tensor([[-4.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    c = torch.diag(torch.tensor([0.04, 0.04], dtype=torch.float64))
    sure, bare = (solve(state_of(delta, r, c), -3.0, confidence=p) for p in (0.8, 0.0))
    assert bare.entropy == pytest.approx(-3.0, abs=1e-4)
    assert sure.reached
    assert sure.entropy > bare.entropy + 0.1
    assert sure.entropy_bound == pytest.approx(-3.0, abs=1e-4)


def test_error_bar_of_one_kind_is_students() -> None:
    """Scheffe's bound of one mean is the quantile of |t| of the state's degrees of freedom."""
    one = torch.ones(1, dtype=torch.float64)
    sums = KindSums(("A>0",), -4 * one, one, one.outer(one), 0 * one.outer(one), torch.tensor(0.0).double(), 7.0)
    state = fx.control.update(fx.control.control_state(), sums, forgetting=0.9)
    out = solve(state, 10.0, bounds=(0.0, 1.0))
    assert out.weights.tolist() == pytest.approx([0.0])
    assert out.entropy_bound == pytest.approx(-t.ppf(0.9, 7))


def test_error_bar_of_the_step_without_weights_asks_for_nothing() -> None:
    """At the target, however uncertain the whole step is; an error common to all kinds is that of the step."""
    delta, r = torch.tensor([[-2.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    out = solve(state_of(delta, r, torch.full((2, 2), 1e4, dtype=torch.float64)), 0.0)
    assert out.reached
    assert out.weights.tolist() == pytest.approx([1.0, 1.0])
    assert out.entropy_bound == pytest.approx(1.0)


def test_unreachable_floor_gives_the_largest_sure_rise() -> None:
    delta, r = torch.tensor([[-4.0, 2.0, 0.0], [1.0, -1.0, 1.0]], dtype=torch.float64)
    c = torch.diag(torch.tensor([0.01, 0.01, 4.0], dtype=torch.float64))
    out = solve(state_of(delta, r, c), 100.0)
    assert not out.reached
    assert out.weights.tolist() == pytest.approx([0.0, 1.5, 1.0], abs=1e-4)


def test_kinds_never_measured_have_weight_one() -> None:
    state = fx.control.control_state(["A>0", "A<0"])
    assert solve(state, 5.0).weights.tolist() == [1.0, 1.0]
    assert solve(fx.control.control_state(), 5.0).by_kind == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0; expected a positive number"),
        ({"horizon": 0}, "horizon is 0; expected a positive number of steps"),
        ({"confidence": 1.0}, "confidence is 1.0; expected a probability below 1"),
        ({"bounds": (0.0, 0.5)}, "expected two numbers with 0 <= lowest <= 1 <= highest"),
    ],
)
def test_weights_refuse_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        solve(fx.control.control_state(["A>0"]), 0.0, **options)
    with pytest.raises(ValueError, match="target is nan; expected nats"):
        fx.control.weights(fx.control.control_state(), 1.0, math.nan, lr=LR)
