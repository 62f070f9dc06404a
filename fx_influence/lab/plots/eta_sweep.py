"""The step at finite eta: importance sampling beside the derivatives."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fx_influence.lab.plots.style import BLACK, ORANGE, UNIT, figure, styled, zero_line
from fx_influence.lab.results import EntropyInfluenceResults

DIRECTIONS = {"full": ("whole step", BLACK, "o"), "baseline": ("momentum and decay only", ORANGE, "s")}
OFFSETS = {"full": -1, "baseline": 1}
"""Sides to which points are shifted, so that error bars at one eta do not overlap."""


@styled
def eta_sweep(results: EntropyInfluenceResults, evaluation: int = 0) -> Figure:
    """Draw Delta H at finite steps by importance sampling (SNIS), with the JVP's tangent and parabola.

    Left the change at the steps that lines are fitted to, right the change over eta at all steps, where the tangent is
    horizontal.

    Raises:
        ValueError: for a run without finite steps.
    """
    arrays = results.evaluations[evaluation].arrays
    if not len(arrays["eta"]) or "full" not in arrays:
        raise ValueError(
            "the run has no finite step of the full update; expected at least one. Give directions 'full' and "
            "eta_multiples"
        )
    derivatives = _derivatives(results, evaluation)
    fitted = len(results.plan.eta_multiples) if len(arrays["eta"]) > 1 else 1
    unit = results.summary.get("reference_lr") or results.summary["lr"] or 1.0
    drawing = figure(8.4, 3.6)
    left, right = drawing.subplots(1, 2)
    names = [name for name in DIRECTIONS if name in arrays and name in derivatives]
    for name in names:
        _change(left, arrays, name, derivatives[name], unit, fitted)
        _secants(right, arrays, name, derivatives[name], unit, OFFSETS[name] if len(names) > 1 else 0)
    left.set_xlabel(f"step η (lr, {unit:g})")
    left.set_ylabel("change of entropy (nats)")
    left.set_title("SNIS ±1 stderr (points), tangent (line), parabola (dotted)", fontsize=8.5)
    left.legend(fontsize=8)
    zero_line(left)
    right.set_xscale("log")
    right.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    right.set_xlabel(f"step η (lr, {unit:g})")
    right.set_ylabel(f"change of entropy / η ({UNIT})")
    right.set_title("The same over η: constant while it is linear", fontsize=8.5)
    zero_line(right)
    return drawing


def _derivatives(results: EntropyInfluenceResults, evaluation: int) -> dict[str, tuple[float, float]]:
    """Return first and second derivative by direction; a step of a training run has the first along ``full`` only."""
    evaluated = results.evaluations[evaluation]
    derivatives = {
        name: (float(evaluated.arrays[f"{name}_first"]), float(evaluated.arrays[f"{name}_second"]))
        for name in DIRECTIONS
        if f"{name}_first" in evaluated.arrays
    }
    return {"full": (float(evaluated.summary["total"]), float("nan")), **derivatives}


def _change(
    axes: Axes,
    arrays: dict[str, np.ndarray],
    name: str,
    derivatives: tuple[float, float],
    unit: float,
    fitted: int,
) -> None:
    """Draw Delta H at the first ``fitted`` etas with the tangent and, unless ``second`` is NaN, the parabola."""
    first, second = derivatives
    label, colour, marker = DIRECTIONS[name]
    eta = arrays["eta"][:fitted]
    errors = arrays[f"{name}_stderr"][:fitted]
    axes.errorbar(
        eta / unit, arrays[name][:fitted], errors, fmt=marker, color=colour, markersize=4, capsize=2, label=label
    )
    x = np.linspace(0, eta.max() * 1.05, 200)
    axes.plot(x / unit, first * x, color=colour, linewidth=1.2)
    if not np.isnan(second):
        axes.plot(x / unit, first * x + second * x**2 / 2, color=colour, linewidth=1, linestyle=":")


def _secants(
    axes: Axes, arrays: dict[str, np.ndarray], name: str, derivatives: tuple[float, float], unit: float, offset: int
) -> None:
    """Draw Delta H over eta at all etas, shifted by ``offset`` point widths, with the first derivative."""
    _, colour, marker = DIRECTIONS[name]
    eta = arrays["eta"]
    secants, errors = arrays[name] / eta, arrays[f"{name}_stderr"] / eta
    axes.errorbar(eta / unit * 1.04**offset, secants, errors, fmt=marker, color=colour, markersize=4, capsize=2)
    axes.axhline(derivatives[0], color=colour, linewidth=1.2)
