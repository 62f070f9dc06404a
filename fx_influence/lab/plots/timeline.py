"""The entropy of a training run over its steps, with predicted and measured changes, and its health over them."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fx_influence.interop.ledger.file import STEP
from fx_influence.lab.plots.ledger import after_last
from fx_influence.lab.plots.style import BLACK, BLUE, ORANGE, figure, styled, zero_line
from fx_influence.lab.training.account import Series
from fx_influence.lab.training.load import Training

PREDICTED, MEASURED = ORANGE, BLUE
"""Colours of the predicted and the measured change."""

MAX_BARS = 60
"""Measured steps up to which each change has an error bar; more have a band."""

HEALTH = {
    "conditioning": "conditioning",
    "step_rounding": "share of the step lost to rounding",
    "rounding": "rounding / sum of |influence|",
    "unattributed": "unattributed / sum of |influence|",
    "ess": "effective sample / rollouts of E",
    "clip_fraction": "share of tokens that the loss clips",
    "truncated": "share of truncated rollouts",
    "length": "tokens of a completion, mean",
    "reward": "reward, mean",
    "lr": "learning rate",
}
"""Columns that ``health_over_steps`` draws, with their titles."""

OVER = {"rounding": "absolute", "unattributed": "absolute", "ess": "evaluation_count"}
"""Columns that are drawn in relation to another."""


@styled
def timeline(training: Training) -> Figure:
    """Draw the entropy before each measured step, with the predicted and measured changes laid over it.

    Above the entropy on each step's E, and the predicted and measured changes of the measured steps summed up, at the
    level that fits these entropies best, since a single one is noisy; below the change of each step, with ±1 standard
    error. Between measured steps the sums are constant.
    """
    drawing = figure(7.2, 4.0)
    above, below = drawing.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    columns = training.steps
    steps, entropy = columns[STEP], columns["entropy"]
    _laid_over(above, training)
    points = {"marker": "o", "markersize": 2.5} if len(steps) <= MAX_BARS else {}
    above.plot(steps, entropy, color=BLACK, linewidth=1.2, label="entropy on E before the step", **points)
    above.set_ylabel("entropy (nats)")
    above.set_title("Entropy, and what the measured steps changed of it")
    above.legend(fontsize=7.5)
    for name, error, colour, offset in (
        ("total", "stderr", PREDICTED, -0.15),
        ("measured", "measured_stderr", MEASURED, 0.15),
    ):
        if name == "total" and not training.splits_the_step:
            continue
        _changes(below, steps + offset, columns[name], columns[error], colour)
    below.set_ylabel("change in a step (nats)")
    below.set_xlabel("optimizer step")
    zero_line(below)
    return drawing


@styled
def health_over_steps(training: Training) -> Figure:
    """Draw what tells how far to trust each measured step, and what the trainer did, as small figures over the steps.

    Raises:
        ValueError: where no step has any of these figures.
    """
    columns = training.steps
    names = [name for name in HEALTH if np.isfinite(columns[name]).any()]
    if not names:
        raise ValueError("steps has no figures of its health; expected some. Measure with EntropyInfluence")
    rows = -(-len(names) // 2)
    drawing = figure(7.2, 1.25 * rows + 0.4)
    grid = drawing.subplots(rows, 2, sharex=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        values = np.abs(columns[name]) if name == "unattributed" else columns[name]
        if name in OVER:
            size = columns[OVER[name]]
            values = values / np.where(size > 0, size, np.nan)
        axes.plot(columns[STEP], values, color=BLACK, linewidth=1, marker="o" if len(values) <= MAX_BARS else "", ms=2)
        axes.set_title(HEALTH[name], fontsize=8)
        axes.tick_params(labelsize=7)
        axes.margins(y=0.15)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step", fontsize=8)
    return drawing


def _laid_over(axes: Axes, training: Training) -> None:
    """Draw the level plus the sums of changes, from before the first measured step to after the last one."""
    columns, edges = training.steps, after_last(training.steps[STEP])
    level, share = _level(columns), f", {training.coverage:.0%} of the steps" if training.coverage < 1 else ""
    for name, error, colour, label in (
        ("total", "stderr", PREDICTED, "predicted changes summed up, level fitted"),
        ("measured", "measured_stderr", MEASURED, "measured changes summed up, level fitted"),
    ):
        known = np.isfinite(columns[name])
        if not known.any() or (name == "total" and not training.splits_the_step):
            continue
        # An unknown change adds nothing, and an unknown error makes those of the following sums unknown.
        values, stderr = np.where(known, columns[name], 0.0), np.where(known, columns[error], 0.0)
        sums = Series(np.append(0.0, values), np.append(0.0, stderr)).cumulative()
        axes.step(edges, level + sums.values, where="post", color=colour, linewidth=1.2, label=f"{label}{share}")
        if np.isfinite(sums.stderr).any():
            low, high = level + sums.values - sums.stderr, level + sums.values + sums.stderr
            axes.fill_between(edges, low, high, step="post", color=colour, alpha=0.18, lw=0)


def _level(columns: dict[str, np.ndarray]) -> float:
    """Return the entropy before the first measured step that fits those of all steps and the measured changes best."""
    name = "measured" if np.isfinite(columns["measured"]).any() else "total"
    changes = np.nan_to_num(columns[name])
    levels = columns["entropy"] - (changes.cumsum() - changes)
    known = levels[np.isfinite(levels)]
    return float(known.mean()) if known.size else float("nan")


def _changes(axes: Axes, steps: np.ndarray, values: np.ndarray, errors: np.ndarray, colour: str) -> None:
    if len(steps) <= MAX_BARS:
        axes.errorbar(steps, values, np.nan_to_num(errors), fmt="o", color=colour, markersize=2.5, elinewidth=0.8)
        return
    axes.plot(steps, values, color=colour, linewidth=0.8)
    axes.fill_between(steps, values - errors, values + errors, color=colour, alpha=0.18, lw=0)
