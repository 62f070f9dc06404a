"""Fits to curves whose derivatives and trusted steps are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tolerances import rounding_bound
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import linregress

from fx_influence.lab.analysis.finite_steps.linearity import (
    additivity_gap,
    agreement,
    compare_stability,
    eta_trust,
    fit_lines,
    measured_trust,
)

ETA = np.array([0.2, 0.5, 1.0, 2.0, 5.0]) * 1e-4
# Least squares over five etas, whose normal equations subtract numbers a thousand times as large as the result.
FIT = rounding_bound(torch.float64, 100, 1e3)
slopes = st.floats(0.1, 100.0).flatmap(lambda x: st.sampled_from([x, -x]))
curvatures = st.floats(-1e5, 1e5)


@given(slope=slopes, second_derivative=curvatures)
def test_fit_lines_recovers_a_parabola(slope: float, second_derivative: float) -> None:
    fit = fit_lines(ETA, slope * ETA + 0.5 * second_derivative * ETA**2)
    size = abs(slope) + abs(second_derivative) * ETA[-1]
    assert fit.slope_at_0 == pytest.approx(slope, abs=FIT * size)
    assert fit.curvature == pytest.approx(second_derivative, abs=FIT * size / ETA[0])
    if abs(second_derivative) > 1:
        trust = float(fit.eta_trust)
        assert abs(0.5 * second_derivative * trust**2) == pytest.approx(
            0.1 * abs(slope) * trust, rel=FIT * size / abs(second_derivative * ETA[0])
        )


@given(values=st.lists(st.floats(-1, 1), min_size=5, max_size=5))
def test_fit_lines_minimises_squares_through_the_origin(values: list[float]) -> None:
    delta = np.array(values)
    fit = fit_lines(ETA, delta)

    def squares(slope: float) -> float:
        return float(((delta - slope * ETA) ** 2).sum())

    assert squares(float(fit.slope)) <= min(squares(float(fit.slope) * 1.01 + 1), squares(float(fit.slope) * 0.99 - 1))
    if np.ptp(delta) > 1e-3:
        assert fit.r2 == pytest.approx(1 - squares(float(fit.slope)) / (delta.var() * 5), rel=FIT, abs=FIT)
        free = linregress(ETA, delta).rvalue ** 2
        assert fit.r2 <= free + FIT, "a line that may have an intercept explains more"


def test_fit_lines_fits_each_direction_separately() -> None:
    delta = np.stack([3 * ETA, np.zeros(5), -2 * ETA + 5e3 * ETA**2], axis=1)
    fit = fit_lines(ETA, delta)
    assert fit.slope[0] == pytest.approx(3)
    assert fit.r2[0] == pytest.approx(1)
    assert fit.spread[0] == pytest.approx(0, abs=FIT)
    assert np.isnan(fit.r2[1])
    assert np.isnan(fit.spread[1])
    assert fit.r2[2] < 0.9
    assert fit.spread[2] > 0.3
    for k in range(3):
        single = fit_lines(ETA, delta[:, k])
        np.testing.assert_allclose([field[k] for field in fit], [float(field) for field in single], equal_nan=True)


@pytest.mark.parametrize(
    ("count", "known"), [(1, {"slope"}), (2, {"slope", "slope_at_0", "curvature", "eta_trust", "spread"})]
)
def test_fit_lines_is_nan_where_points_are_too_few(count: int, known: set[str]) -> None:
    fit = fit_lines(ETA[:count], (3 * ETA + 1e3 * ETA**2)[:count])
    assert {name for name, value in fit._asdict().items() if not np.isnan(value)} == known


def test_measured_trust_ends_at_the_first_failure() -> None:
    error = np.array([0.05, 0.09, 0.11, 0.02, 0.5])
    delta = 2 * ETA * (1 + error)
    assert measured_trust(ETA, delta, np.array(2.0)) == ETA[1], "agreement beyond the first failure is chance"
    shuffled = np.array([3, 0, 4, 1, 2])
    assert measured_trust(ETA[shuffled], delta[shuffled], np.array(2.0)) == ETA[1]
    assert measured_trust(ETA, 2 * ETA * 1.2, np.array(2.0)) == 0
    two_columns = measured_trust(ETA, np.stack([delta, -delta], axis=1), np.array([2.0, -2.0]))
    assert two_columns.tolist() == [ETA[1], ETA[1]]


def test_agreement_takes_the_largest_trusted_step() -> None:
    first = np.array([1.0, -2.0, 0.0, 4.0])
    second_derivative = np.array([1e3, 1e3, 0.0, 1e5])
    delta = first * ETA[:, None] + 0.5 * second_derivative * ETA[:, None] ** 2
    result = agreement(ETA, delta, first, eta_trust(first, second_derivative))
    # Trusted are 2e-4, 4e-4 and 8e-6 for the nonzero rollouts, so 2e-4, 2e-4 and, as the smallest, 2e-5 are taken.
    errors = np.array([0.5e3 * 2e-4, 0.5e3 * 2e-4, 0.5e5 * 2e-5])
    assert result.max_error == pytest.approx(errors.max() / 4)
    assert result.max_relative_error == pytest.approx((errors / np.array([1, 2, 4])).max())
    assert result.spearman == 1.0
    assert result.rollouts == 3
    assert agreement(ETA, -delta, first, eta_trust(first, second_derivative)).spearman == -1.0


def test_additivity_gap_is_relative_to_the_whole_step() -> None:
    full, baseline, grad = np.array([-4.0, 2.0]), np.array([1.0, 1.0]), np.array([[-2.0, -3.5], [0.5, 0.5]])
    np.testing.assert_allclose(additivity_gap(full, baseline, grad), [0.125, 0.0])


def test_compare_stability_prefers_the_smaller_spread() -> None:
    curvatures = np.array([1e2, 1e3, 0.0])
    grad = fit_lines(ETA, ETA[:, None] * np.array([1.0, 1.0, 0.0]) + curvatures * ETA[:, None] ** 2)
    baseline_plus_grad = fit_lines(ETA, ETA[:, None] * np.array([1.0, 1.0, 0.0]) + 5 * curvatures * ETA[:, None] ** 2)
    assert compare_stability(grad, baseline_plus_grad)["verdict"] == "grad"
    assert compare_stability(baseline_plus_grad, grad)["verdict"] == "baseline_plus_grad"
    verdict = compare_stability(grad, grad)
    assert (verdict["verdict"], verdict["grad_wins"], verdict["baseline_plus_grad_wins"]) == ("neither", 0, 0)
    assert compare_stability(grad, baseline_plus_grad)["grad_wins"] == 2, "a rollout whose Delta H is 0 has no secants"
