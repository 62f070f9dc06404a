"""The finite steps of one E in figures: what follows from the arrays of ``eval_00.npz`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fx_influence.lab.analysis.finite_steps.linearity import (
    additivity_gap,
    agreement,
    eta_trust,
    fit_lines,
    measured_trust,
    steadier,
)
from fx_influence.lab.analysis.finite_steps.noise import signal_to_noise
from fx_influence.lab.plan.plans import ROLLOUT_DIRECTIONS, STEP_DIRECTIONS

Arrays = Mapping[str, np.ndarray]
FLOAT64 = "_float64"


def rollout_parts(arrays: Arrays, suffix: str = "") -> dict[str, np.ndarray]:
    """Raw Delta H of each rollout's part, (n_eta, n_u): along v_i, and along v_baseline + v_i less the baseline's.

    ``suffix``: ``"_float64"`` for the sweep in float64. A part that was not swept is absent.

    Example:
        >>> swept = {"baseline": np.array([1.0]), "baseline_plus_grad": np.array([[3.0, 0.5]])}
        >>> rollout_parts(swept)["baseline_plus_grad"].tolist()
        [[2.0, -0.5]]
    """
    parts = {name: arrays[name + suffix] for name in ROLLOUT_DIRECTIONS if name + suffix in arrays}
    if "baseline_plus_grad" in parts:
        parts["baseline_plus_grad"] = parts["baseline_plus_grad"] - arrays["baseline" + suffix][:, None]
    return parts


def rollout_fits(arrays: Arrays, fitted: int) -> dict[str, np.ndarray]:
    """Lines through each rollout's part at the first ``fitted`` etas, see ``fit_lines``; (n_u,) by ``grad_slope``, ...

    ``grad_eta_trust`` is by the second derivative where the sweep has ``grad_second``, else by the fitted parabola,
    which is ``grad_eta_trust_by_fit``; ``grad_eta_trust_measured``: see ``measured_trust``.
    """
    found: dict[str, np.ndarray] = {}
    for name, part in rollout_parts(arrays).items():
        fit = fit_lines(arrays["eta"][:fitted], part[:fitted])
        found |= {
            f"{name}_{field}": getattr(fit, field) for field in ("slope", "r2", "curvature", "eta_trust", "spread")
        }
        if f"{name}_second" in arrays:
            offset = arrays["baseline_second"] if name == "baseline_plus_grad" else 0.0
            found[f"{name}_eta_trust"] = eta_trust(arrays["per_sequence"], arrays[f"{name}_second"] - offset)
        found[f"{name}_eta_trust_by_fit"] = fit.eta_trust
        found[f"{name}_eta_trust_measured"] = measured_trust(arrays["eta"], part, arrays["per_sequence"])
    return found


def finite_figures(arrays: Arrays, fitted: int, floor: float) -> dict[str, Any]:
    """``summary.json``'s entries on finite steps, from ``arrays`` with their ``rollout_fits``.

    ``finite_steps``: per eta, SNIS beside eta times the JVP, raw nats. ``linearity``: the fits of every direction.
    ``additivity_gap``: per eta, see ``linearity.additivity_gap``. ``agreement`` and ``agreement_float64``: SNIS slopes
    of the rollouts beside the JVP's. ``steadier``: which of a rollout's two parts has the more stable slope.
    ``signal_to_noise``: per eta. ``auto_scale``: the steps chosen for the rollouts and what they show. What was not
    swept is absent.
    """
    eta, parts = arrays["eta"], rollout_parts(arrays)
    whole = [name for name in STEP_DIRECTIONS if name in arrays]
    figures: dict[str, Any] = {
        "finite_steps": [_step(arrays, whole, k, k < fitted) for k in range(len(eta))],
        "linearity": {name: _whole_line(arrays, name, fitted) for name in whole}
        | {name: _median_line(arrays, name, fitted) for name in parts},
        "agreement": _agreement(arrays, parts),
    }
    if exact := rollout_parts(arrays, FLOAT64):
        figures["agreement_float64"] = _agreement(arrays, exact)
    if {"full", "baseline", "grad"} <= set(arrays):
        gap = additivity_gap(arrays["full"], arrays["baseline"], arrays["grad"])
        figures["additivity_gap"] = gap.tolist()
    if len(parts) == len(ROLLOUT_DIRECTIONS):
        alone, beside = (fit_lines(eta[:fitted], parts[name][:fitted]) for name in ROLLOUT_DIRECTIONS)
        figures["steadier"] = steadier(alone, beside)
    if "grad" in arrays:
        errors = (arrays["grad_stderr"], floor, arrays.get("grad" + FLOAT64))
        figures["signal_to_noise"] = signal_to_noise(eta, arrays["grad"], *errors)
    if "auto_grad" in arrays:
        figures["auto_scale"] = _auto(arrays, floor)
    return figures


def _agreement(arrays: Arrays, parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    first = arrays["per_sequence"]
    return {
        name: agreement(arrays["eta"], part, first, arrays[f"{name}_eta_trust"])._asdict()
        for name, part in parts.items()
    }


def _step(arrays: Arrays, whole: list[str], k: int, fitted: bool) -> dict[str, Any]:
    eta = float(arrays["eta"][k])
    record: dict[str, Any] = {"eta": eta, "fitted": fitted}
    for name in whole:
        first, second = (eta * float(arrays[f"{name}_first"]), 0.5 * eta**2 * float(arrays[f"{name}_second"]))
        record |= {f"{name}_{field}": float(arrays[f"{name}_{field}"][k]) for field in ("stderr", "ess")}
        record |= {name: float(arrays[name][k]), f"{name}_jvp": first, f"{name}_jvp_second_order": first + second}
    return record


def _whole_line(arrays: Arrays, name: str, fitted: int) -> dict[str, Any]:
    eta, first, second = arrays["eta"], arrays[f"{name}_first"], arrays[f"{name}_second"]
    fit = fit_lines(eta[:fitted], arrays[name][:fitted])
    line = {
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
        line["r2_float64"] = float(fit_lines(eta[:fitted], arrays[name + FLOAT64][:fitted]).r2)
    return line


def _median_line(arrays: Arrays, name: str, fitted: int) -> dict[str, Any]:
    """Medians over the rollouts that move anything."""
    eta, trust = arrays["eta"], arrays[f"{name}_eta_trust_measured"]
    line = {
        "median_r2": _median(arrays[f"{name}_r2"]),
        "median_eta_trust": _median(arrays[f"{name}_eta_trust"]),
        "median_eta_trust_measured": _median(trust[arrays["per_sequence"] != 0]),
    }
    exact = rollout_parts(arrays, FLOAT64)
    if name in exact:
        line["median_r2_float64"] = _median(fit_lines(eta[:fitted], exact[name][:fitted]).r2)
    return line


def _auto(arrays: Arrays, floor: float) -> dict[str, Any]:
    eta, delta, first = arrays["auto_eta"], arrays["auto_grad"], arrays["per_sequence"]
    moving = eta > 0
    slope = delta[moving] / eta[moving]
    off = np.abs(slope - first[moving]) / np.abs(first[moving])
    return {
        "eta_smallest": float(eta[moving].min()) if moving.any() else None,
        "eta_median": _median(eta[moving]),
        "eta_largest": float(eta[moving].max()) if moving.any() else None,
        "median_clearance": _median(np.abs(delta[moving]) / floor) if floor else None,
        "smallest_clearance": float((np.abs(delta[moving]) / floor).min()) if floor and moving.any() else None,
        "median_relative_error": _median(off),
        "largest_relative_error": float(off.max()) if moving.any() else None,
    }


def _median(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else None
