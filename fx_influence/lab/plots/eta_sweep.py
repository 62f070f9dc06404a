"""The step at finite eta: importance sampling beside the tangent."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fx_influence.lab.plots.style import BLACK, ORANGE, UNIT, figure, styled, zero_line
from fx_influence.lab.results import EntropyInfluenceResults

SHOWN = {"full": ("whole step", BLACK, "o"), "baseline": ("momentum and decay alone", ORANGE, "s")}
APART = {"full": -1, "baseline": 1}
"""To which side points are moved, so that error bars at one eta stand beside each other."""


@styled
def eta_sweep(results: EntropyInfluenceResults, evaluation: int = 0) -> Figure:
    """Delta H at finite steps by importance sampling (SNIS), with the JVP's tangent and parabola.

    Left the change itself at the steps that lines are fitted to, right the change over eta at all steps, where the
    tangent is level. Raises ``ValueError`` for a run without finite steps.
    """
    arrays = results.evaluations[evaluation].arrays
    if not len(arrays["eta"]) or "full" not in arrays:
        raise ValueError("the run holds no finite step of the whole update: give directions 'full' and eta_multiples")
    slopes = _slopes(results, evaluation)
    fitted = len(results.plan.eta_multiples) if len(arrays["eta"]) > 1 else 1
    unit = results.summary.get("reference_lr") or results.summary["lr"] or 1.0
    made = figure(8.4, 3.6)
    left, right = made.subplots(1, 2)
    shown = [name for name in SHOWN if name in arrays and name in slopes]
    for name in shown:
        aside = APART[name] if len(shown) > 1 else 0
        _change(left, arrays, name, slopes[name], unit, fitted, aside)
        _secants(right, arrays, name, slopes[name], unit, aside)
    left.set_xlabel(f"step η (lr, {unit:g})")
    left.set_ylabel("change of entropy (nats)")
    left.set_title("SNIS ±1 stderr (points), tangent (line), parabola (dotted)", fontsize=8.5)
    left.legend(fontsize=8)
    zero_line(left)
    right.set_xscale("log")
    right.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    right.set_xlabel(f"step η (lr, {unit:g})")
    right.set_ylabel(f"change of entropy / η ({UNIT})")
    right.set_title("The same over η: level while it is linear", fontsize=8.5)
    zero_line(right)
    return made


def _slopes(results: EntropyInfluenceResults, evaluation: int) -> dict[str, tuple[float, float]]:
    """First and second derivative by direction; a step measured in a training has the first of the whole only."""
    found = results.evaluations[evaluation]
    slopes = {
        name: (float(found.arrays[f"{name}_first"]), float(found.arrays[f"{name}_second"]))
        for name in SHOWN
        if f"{name}_first" in found.arrays
    }
    return {"full": (float(found.summary["total"]), float("nan")), **slopes}


def _change(
    axes: Axes,
    arrays: dict[str, np.ndarray],
    name: str,
    slope: tuple[float, float],
    unit: float,
    fitted: int,
    aside: int,
) -> None:
    label, colour, marker = SHOWN[name]
    eta = arrays["eta"][:fitted]
    errors = arrays[f"{name}_stderr"][:fitted]
    axes.errorbar(
        eta / unit, arrays[name][:fitted], errors, fmt=marker, color=colour, markersize=4, capsize=2, label=label
    )
    x = np.linspace(0, eta.max() * 1.05, 200)
    axes.plot(x / unit, slope[0] * x, color=colour, linewidth=1.2)
    if not np.isnan(slope[1]):
        axes.plot(x / unit, slope[0] * x + slope[1] * x**2 / 2, color=colour, linewidth=1, linestyle=":")


def _secants(
    axes: Axes, arrays: dict[str, np.ndarray], name: str, slope: tuple[float, float], unit: float, aside: int
) -> None:
    _, colour, marker = SHOWN[name]
    eta = arrays["eta"]
    secants, errors = arrays[name] / eta, arrays[f"{name}_stderr"] / eta
    axes.errorbar(eta / unit * 1.04**aside, secants, errors, fmt=marker, color=colour, markersize=4, capsize=2)
    axes.axhline(slope[0], color=colour, linewidth=1.2)
