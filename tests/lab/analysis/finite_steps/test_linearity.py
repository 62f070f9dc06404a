"""Fits against what they are of: curves whose slopes, bends and trusted steps are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tolerances import rounding_bound
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import linregress

from fx_influence.lab.analysis.finite_steps.figures import finite_figures, rollout_fits, rollout_parts
from fx_influence.lab.analysis.finite_steps.linearity import (
    additivity_gap,
    agreement,
    eta_trust,
    fit_lines,
    measured_trust,
    steadier,
)

ETA = np.array([0.2, 0.5, 1.0, 2.0, 5.0]) * 1e-4
# Least squares over five etas, whose normal equations subtract figures a thousand times as large as what is left.
FIT = rounding_bound(torch.float64, 100, 1e3)
slopes = st.floats(0.1, 100.0).flatmap(lambda x: st.sampled_from([x, -x]))
bends = st.floats(-1e5, 1e5)


@given(slope=slopes, second_derivative=bends)
def test_a_parabola_is_found_exactly(slope: float, second_derivative: float) -> None:
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
def test_the_line_goes_through_the_origin_and_leaves_the_least_squares(values: list[float]) -> None:
    delta = np.array(values)
    fit = fit_lines(ETA, delta)

    def off(slope: float) -> float:
        return float(((delta - slope * ETA) ** 2).sum())

    assert off(float(fit.slope)) <= min(off(fit.slope * 1.01 + 1), off(fit.slope * 0.99 - 1))
    if np.ptp(delta) > 1e-3:
        assert fit.r2 == pytest.approx(1 - off(float(fit.slope)) / (delta.var() * 5), rel=FIT, abs=FIT)
        free = linregress(ETA, delta).rvalue ** 2
        assert fit.r2 <= free + FIT, "a line that may have an intercept explains more"


def test_directions_are_fitted_one_by_one_and_what_does_not_move_has_no_fit() -> None:
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
        alone = fit_lines(ETA, delta[:, k])
        np.testing.assert_allclose([field[k] for field in fit], [float(field) for field in alone], equal_nan=True)


@pytest.mark.parametrize(
    ("count", "known"), [(1, {"slope"}), (2, {"slope", "slope_at_0", "curvature", "eta_trust", "spread"})]
)
def test_few_points_leave_out_what_they_cannot_say(count: int, known: set[str]) -> None:
    fit = fit_lines(ETA[:count], (3 * ETA + 1e3 * ETA**2)[:count])
    assert {name for name, value in fit._asdict().items() if not np.isnan(value)} == known


def test_measured_trust_ends_where_the_first_order_first_fails() -> None:
    error = np.array([0.05, 0.09, 0.11, 0.02, 0.5])
    delta = 2 * ETA * (1 + error)
    assert measured_trust(ETA, delta, np.array(2.0)) == ETA[1], "that it agrees again later is chance"
    shuffled = np.array([3, 0, 4, 1, 2])
    assert measured_trust(ETA[shuffled], delta[shuffled], np.array(2.0)) == ETA[1]
    assert measured_trust(ETA, 2 * ETA * 1.2, np.array(2.0)) == 0
    both = measured_trust(ETA, np.stack([delta, -delta], axis=1), np.array([2.0, -2.0]))
    assert both.tolist() == [ETA[1], ETA[1]]


def test_agreement_takes_each_rollouts_largest_trusted_step() -> None:
    first = np.array([1.0, -2.0, 0.0, 4.0])
    second_derivative = np.array([1e3, 1e3, 0.0, 1e5])
    delta = first * ETA[:, None] + 0.5 * second_derivative * ETA[:, None] ** 2
    found = agreement(ETA, delta, first, eta_trust(first, second_derivative))
    # Trusted: 2e-4, 4e-4 and 8e-6 for the movers; so 2e-4 and 2e-4 are taken, and for the last the smallest, 2e-5.
    errors = np.array([0.5e3 * 2e-4, 0.5e3 * 2e-4, 0.5e5 * 2e-5])
    assert found.max_error == pytest.approx(errors.max() / 4)
    assert found.max_relative_error == pytest.approx((errors / np.array([1, 2, 4])).max())
    assert found.spearman == 1.0
    assert found.rollouts == 3
    assert agreement(ETA, -delta, first, eta_trust(first, second_derivative)).spearman == -1.0


def test_the_gap_of_the_parts_is_relative_to_the_whole() -> None:
    full, baseline, grad = np.array([-4.0, 2.0]), np.array([1.0, 1.0]), np.array([[-2.0, -3.5], [0.5, 0.5]])
    np.testing.assert_allclose(additivity_gap(full, baseline, grad), [0.125, 0.0])


def test_the_steadier_part_is_the_one_whose_secants_vary_less() -> None:
    bends = np.array([1e2, 1e3, 0.0])
    alone = fit_lines(ETA, ETA[:, None] * np.array([1.0, 1.0, 0.0]) + bends * ETA[:, None] ** 2)
    beside = fit_lines(ETA, ETA[:, None] * np.array([1.0, 1.0, 0.0]) + 5 * bends * ETA[:, None] ** 2)
    assert steadier(alone, beside)["verdict"] == "grad"
    assert steadier(beside, alone)["verdict"] == "baseline_plus_grad"
    verdict = steadier(alone, alone)
    assert (verdict["verdict"], verdict["grad_wins"], verdict["baseline_plus_grad_wins"]) == ("neither", 0, 0)
    assert steadier(alone, beside)["grad_wins"] == 2, "a rollout that moves nothing has no secants"


def swept() -> dict[str, np.ndarray]:
    """A sweep over three rollouts, the last of which moves nothing, along curves that are known."""
    first, second_derivative = np.array([2.0, -1.0, 0.0]), np.array([100.0, 400.0, 0.0])
    grad = first * ETA[:, None] + 0.5 * second_derivative * ETA[:, None] ** 2
    baseline = 3.0 * ETA + 500 * ETA**2
    full = baseline + grad.sum(1) * 1.02
    arrays = {"eta": ETA, "per_sequence": first, "grad": grad, "baseline": baseline, "full": full}
    arrays |= {"grad_stderr": np.abs(grad) / 4, "grad_float64": grad * 1.001, "baseline_float64": baseline}
    arrays["baseline_plus_grad"] = baseline[:, None] + grad + np.array([300, 300, 0]) * ETA[:, None] ** 2
    for name, slope, second in (("full", 4.0, 1500.0), ("baseline", 3.0, 1000.0)):
        arrays |= {f"{name}_first": np.array(slope), f"{name}_second": np.array(second)}
        arrays |= {f"{name}_stderr": np.full(5, 1e-5), f"{name}_ess": np.full(5, 9.0)}
    return arrays


def test_the_part_of_a_rollout_beside_the_baseline_is_what_is_left_without_it() -> None:
    arrays = swept()
    parts = rollout_parts(arrays)
    np.testing.assert_array_equal(parts["grad"], arrays["grad"])
    np.testing.assert_allclose(parts["baseline_plus_grad"], arrays["baseline_plus_grad"] - arrays["baseline"][:, None])
    assert list(rollout_parts(arrays, "_float64")) == ["grad"]


def test_the_figures_of_a_sweep_are_those_of_its_curves() -> None:
    arrays = swept()
    arrays |= rollout_fits(arrays, fitted=4)
    np.testing.assert_allclose(arrays["grad_curvature"][:2], [100, 400], rtol=FIT)
    np.testing.assert_allclose(arrays["grad_eta_trust"][:2], [0.2 * 2 / 100, 0.2 / 400], rtol=FIT)
    figures = finite_figures(arrays, fitted=4, floor=1e-6)
    step = figures["finite_steps"][2]
    assert (step["eta"], step["fitted"], figures["finite_steps"][4]["fitted"]) == (1e-4, True, False)
    assert step["full_jvp"] == pytest.approx(4e-4)
    assert step["full_jvp_second_order"] == pytest.approx(4e-4 + 0.5 * 1500 * 1e-8)
    line = figures["linearity"]["baseline"]
    assert line["slope_by_jvp"] == 3.0
    assert line["curvature"] == pytest.approx(1000)
    assert line["eta_trust"] == pytest.approx(0.2 * 3 / 1000)
    assert line["eta_trust_measured"] == ETA[-1]
    assert line["r2_float64"] == pytest.approx(line["r2"])
    assert "r2_float64" not in figures["linearity"]["full"]
    assert figures["linearity"]["grad"]["median_r2"] == pytest.approx(float(np.median(arrays["grad_r2"][:2])))
    assert figures["linearity"]["grad"]["median_r2_float64"] == pytest.approx(figures["linearity"]["grad"]["median_r2"])
    np.testing.assert_allclose(
        figures["additivity_gap"], np.abs(0.02 * arrays["grad"].sum(1) / arrays["full"]), rtol=1e-9
    )
    assert figures["steadier"]["verdict"] == "grad"
    assert figures["agreement"]["grad"]["rollouts"] == 2
    exact = agreement(ETA, arrays["grad_float64"], arrays["per_sequence"], arrays["grad_eta_trust"])
    assert figures["agreement_float64"] == {"grad": exact._asdict()}
    assert figures["signal_to_noise"][0]["sampling_median"] == pytest.approx(4)
    assert "auto_scale" not in figures


def test_the_second_derivative_of_the_part_beside_the_baseline_is_less_the_baselines() -> None:
    arrays = swept() | {"baseline_plus_grad_second": np.array([1600.0, 400.0, 1000.0])}
    fits = rollout_fits(arrays, fitted=5)
    np.testing.assert_allclose(fits["baseline_plus_grad_eta_trust"][:2], [0.2 * 2 / 600, 0.2 * 1 / 600])


def test_what_was_not_swept_has_no_figures() -> None:
    arrays = {name: value for name, value in swept().items() if name.split("_")[0] in ("eta", "per", "grad")}
    arrays |= rollout_fits(arrays, 5)
    figures = finite_figures(arrays, 5, 1e-6)
    assert set(figures) == {"finite_steps", "linearity", "agreement", "agreement_float64", "signal_to_noise"}
    assert set(figures["linearity"]) == {"grad"}
    assert set(figures["finite_steps"][0]) == {"eta", "fitted"}


def test_the_auto_scaled_steps_are_summed_up_over_the_rollouts_that_move() -> None:
    arrays = swept() | {"auto_eta": np.array([1e-5, 4e-5, 0.0]), "auto_grad": np.array([2.2e-5, -4e-5, 0.0])}
    auto = finite_figures(arrays | rollout_fits(arrays, 5), 5, floor=1e-7)["auto_scale"]
    assert (auto["eta_smallest"], auto["eta_largest"]) == (1e-5, 4e-5)
    assert auto["median_clearance"] == pytest.approx(310)
    assert auto["largest_relative_error"] == pytest.approx(0.1)
    assert auto["median_relative_error"] == pytest.approx(0.05)
