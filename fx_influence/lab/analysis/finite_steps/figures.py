"""Figures of the finite steps on one E, computed from the arrays of ``eval_00.npz`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fx_influence.lab.analysis.finite_steps.linearity import (
    additivity_gap,
    agreement,
    compare_stability,
    eta_trust,
    fit_lines,
    measured_trust,
)
from fx_influence.lab.analysis.finite_steps.noise import signal_to_noise
from fx_influence.lab.plan import ROLLOUT_DIRECTIONS, STEP_DIRECTIONS

Arrays = Mapping[str, np.ndarray]
FLOAT64 = "_float64"


def rollout_deltas(arrays: Arrays, suffix: str = "") -> dict[str, np.ndarray]:
    """Return raw Delta H of each rollout, (n_eta, n_u): along v_i, and along v_baseline + v_i minus the baseline's.

    ``suffix``: ``"_float64"`` for the sweep in float64. A direction that was not swept is absent.

    Example:
        >>> swept = {"baseline": np.array([1.0]), "baseline_plus_grad": np.array([[3.0, 0.5]])}
        >>> rollout_deltas(swept)["baseline_plus_grad"].tolist()
        [[2.0, -0.5]]
    """
    deltas = {name: arrays[name + suffix] for name in ROLLOUT_DIRECTIONS if name + suffix in arrays}
    if "baseline_plus_grad" in deltas:
        deltas["baseline_plus_grad"] = deltas["baseline_plus_grad"] - arrays["baseline" + suffix][:, None]
    return deltas


def rollout_fits(arrays: Arrays, fitted: int) -> dict[str, np.ndarray]:
    """Return fits (n_u,) of each rollout's Delta H over the first ``fitted`` etas: ``grad_slope`` and so on.

    Fields: those of ``linearity.LineFit``.
    ``grad_eta_trust`` follows from the second derivative where the sweep has ``grad_second``, else from the fitted
    parabola, as ``grad_eta_trust_by_fit`` does; ``grad_eta_trust_measured``: see ``measured_trust``.
    """
    fits: dict[str, np.ndarray] = {}
    for name, delta in rollout_deltas(arrays).items():
        fit = fit_lines(arrays["eta"][:fitted], delta[:fitted])
        fits |= {
            f"{name}_{field}": getattr(fit, field) for field in ("slope", "r2", "curvature", "eta_trust", "spread")
        }
        if f"{name}_second" in arrays:
            offset = arrays["baseline_second"] if name == "baseline_plus_grad" else 0.0
            fits[f"{name}_eta_trust"] = eta_trust(arrays["per_sequence"], arrays[f"{name}_second"] - offset)
        fits[f"{name}_eta_trust_by_fit"] = fit.eta_trust
        fits[f"{name}_eta_trust_measured"] = measured_trust(arrays["eta"], delta, arrays["per_sequence"])
    return fits


def finite_figures(arrays: Arrays, fitted: int, floor: float) -> dict[str, Any]:
    """Return the entries of ``summary.json`` on finite steps.

    Args:
        arrays: arrays of ``eval_00.npz`` with their ``rollout_fits``.
        fitted: number of etas that lines are fitted to.
        floor: nats, |Delta H| caused by rounding the weights.

    ``finite_steps``: per eta, SNIS beside eta times the JVP, raw nats. ``linearity``: the fits of every direction.
    ``additivity_gap``: per eta, see ``linearity.additivity_gap``. ``agreement`` and ``agreement_float64``: SNIS slopes
    of the rollouts beside the JVP's. ``steadier``: see ``linearity.compare_stability``. ``signal_to_noise``: per eta.
    ``auto_scale``: the steps chosen for the rollouts and their errors. Directions that were not swept are absent.
    """
    eta, deltas = arrays["eta"], rollout_deltas(arrays)
    directions = [name for name in STEP_DIRECTIONS if name in arrays]
    figures: dict[str, Any] = {
        "finite_steps": [_step(arrays, directions, k, k < fitted) for k in range(len(eta))],
        "linearity": {name: _direction_fit(arrays, name, fitted) for name in directions}
        | {name: _median_fit(arrays, name, fitted) for name in deltas},
        "agreement": _agreement(arrays, deltas),
    }
    if exact := rollout_deltas(arrays, FLOAT64):
        figures["agreement_float64"] = _agreement(arrays, exact)
    if {"full", "baseline", "grad"} <= set(arrays):
        gap = additivity_gap(arrays["full"], arrays["baseline"], arrays["grad"])
        figures["additivity_gap"] = gap.tolist()
    if len(deltas) == len(ROLLOUT_DIRECTIONS):
        fits = (fit_lines(eta[:fitted], deltas[name][:fitted]) for name in ROLLOUT_DIRECTIONS)
        figures["steadier"] = compare_stability(*fits)
    if "grad" in arrays:
        errors = (arrays["grad_stderr"], floor, arrays.get("grad" + FLOAT64))
        figures["signal_to_noise"] = signal_to_noise(eta, arrays["grad"], *errors)
    if "auto_grad" in arrays:
        figures["auto_scale"] = _auto_scale(arrays, floor)
    return figures


def _agreement(arrays: Arrays, deltas: Mapping[str, np.ndarray]) -> dict[str, Any]:
    first = arrays["per_sequence"]
    return {
        name: agreement(arrays["eta"], delta, first, arrays[f"{name}_eta_trust"])._asdict()
        for name, delta in deltas.items()
    }


def _step(arrays: Arrays, directions: list[str], k: int, fitted: bool) -> dict[str, Any]:
    eta = float(arrays["eta"][k])
    record: dict[str, Any] = {"eta": eta, "fitted": fitted}
    for name in directions:
        first, second = (eta * float(arrays[f"{name}_first"]), 0.5 * eta**2 * float(arrays[f"{name}_second"]))
        record |= {f"{name}_{field}": float(arrays[f"{name}_{field}"][k]) for field in ("stderr", "ess")}
        record |= {name: float(arrays[name][k]), f"{name}_jvp": first, f"{name}_jvp_second_order": first + second}
    return record


def _direction_fit(arrays: Arrays, name: str, fitted: int) -> dict[str, Any]:
    eta, first, second = arrays["eta"], arrays[f"{name}_first"], arrays[f"{name}_second"]
    fit = fit_lines(eta[:fitted], arrays[name][:fitted])
    figures = {
        "slope": float(fit.slope),
        "slope_by_jvp": float(first),
        "r2": float(fit.r2),
        "curvature": float(fit.curvature),
        "curvature_by_jvp": float(second),
        "eta_trust": float(eta_trust(first, second)),
        "eta_trust_by_fit": float(fit.eta_trust),
        "eta_trust_measured": float(measured_trust(eta, arrays[name], first)),
    }
    if name + FLOAT64 in arrays:
        figures["r2_float64"] = float(fit_lines(eta[:fitted], arrays[name + FLOAT64][:fitted]).r2)
    return figures


def _median_fit(arrays: Arrays, name: str, fitted: int) -> dict[str, Any]:
    """Return medians over the rollouts whose derivative is not 0."""
    eta, trust = arrays["eta"], arrays[f"{name}_eta_trust_measured"]
    figures = {
        "median_r2": _median(arrays[f"{name}_r2"]),
        "median_eta_trust": _median(arrays[f"{name}_eta_trust"]),
        "median_eta_trust_measured": _median(trust[arrays["per_sequence"] != 0]),
    }
    exact = rollout_deltas(arrays, FLOAT64)
    if name in exact:
        figures["median_r2_float64"] = _median(fit_lines(eta[:fitted], exact[name][:fitted]).r2)
    return figures


def _auto_scale(arrays: Arrays, floor: float) -> dict[str, Any]:
    eta, delta, first = arrays["auto_eta"], arrays["auto_grad"], arrays["per_sequence"]
    scaled = eta > 0
    slope = delta[scaled] / eta[scaled]
    error = np.abs(slope - first[scaled]) / np.abs(first[scaled])
    return {
        "eta_smallest": float(eta[scaled].min()) if scaled.any() else None,
        "eta_median": _median(eta[scaled]),
        "eta_largest": float(eta[scaled].max()) if scaled.any() else None,
        "median_clearance": _median(np.abs(delta[scaled]) / floor) if floor else None,
        "smallest_clearance": float((np.abs(delta[scaled]) / floor).min()) if floor and scaled.any() else None,
        "median_relative_error": _median(error),
        "largest_relative_error": float(error.max()) if scaled.any() else None,
    }


def _median(values: np.ndarray) -> float | None:
    defined = values[~np.isnan(values)]
    return float(np.median(defined)) if len(defined) else None
