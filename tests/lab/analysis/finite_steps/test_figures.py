"""Figures of a sweep along known curves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tolerances import rounding_bound

from fx_influence.lab.analysis.finite_steps.figures import finite_figures, rollout_deltas, rollout_fits
from fx_influence.lab.analysis.finite_steps.linearity import agreement

ETA = np.array([0.2, 0.5, 1.0, 2.0, 5.0]) * 1e-4
# Least squares over five etas, whose normal equations subtract numbers a thousand times as large as the result.
FIT = rounding_bound(torch.float64, 100, 1e3)


def swept() -> dict[str, np.ndarray]:
    """Return a sweep over three rollouts, the last of which changes nothing, along known curves."""
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


def test_rollout_deltas_subtract_the_baseline() -> None:
    arrays = swept()
    deltas = rollout_deltas(arrays)
    np.testing.assert_array_equal(deltas["grad"], arrays["grad"])
    np.testing.assert_allclose(deltas["baseline_plus_grad"], arrays["baseline_plus_grad"] - arrays["baseline"][:, None])
    assert list(rollout_deltas(arrays, "_float64")) == ["grad"]


def test_finite_figures_match_the_curves_of_a_sweep() -> None:
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


def test_rollout_fits_subtract_the_second_derivative() -> None:
    arrays = swept() | {"baseline_plus_grad_second": np.array([1600.0, 400.0, 1000.0])}
    fits = rollout_fits(arrays, fitted=5)
    np.testing.assert_allclose(fits["baseline_plus_grad_eta_trust"][:2], [0.2 * 2 / 600, 0.2 * 1 / 600])


def test_finite_figures_omit_directions_not_swept() -> None:
    arrays = {name: value for name, value in swept().items() if name.split("_")[0] in ("eta", "per", "grad")}
    arrays |= rollout_fits(arrays, 5)
    figures = finite_figures(arrays, 5, 1e-6)
    assert set(figures) == {"finite_steps", "linearity", "agreement", "agreement_float64", "signal_to_noise"}
    assert set(figures["linearity"]) == {"grad"}
    assert set(figures["finite_steps"][0]) == {"eta", "fitted"}


def test_finite_figures_summarise_auto_scaled_steps() -> None:
    arrays = swept() | {"auto_eta": np.array([1e-5, 4e-5, 0.0]), "auto_grad": np.array([2.2e-5, -4e-5, 0.0])}
    auto = finite_figures(arrays | rollout_fits(arrays, 5), 5, floor=1e-7)["auto_scale"]
    assert (auto["eta_smallest"], auto["eta_largest"]) == (1e-5, 4e-5)
    assert auto["median_clearance"] == pytest.approx(310)
    assert auto["largest_relative_error"] == pytest.approx(0.1)
    assert auto["median_relative_error"] == pytest.approx(0.05)
