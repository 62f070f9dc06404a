"""The account of a training run's entropy over its steps: causes stacked, and each kind with its error bands."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fx_influence.interop.ledger.file import STEP
from fx_influence.lab.plots.style import (
    BLACK,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    YELLOW,
    drawable,
    figure,
    literal,
    styled,
    zero_line,
)
from fx_influence.lab.training.account import Series, causes, label_series
from fx_influence.lab.training.load import Training

CAUSES = {
    "momentum": "#8C8C8C",
    "weight decay": "#C9C9C9",
    "unattributed": "#E3E3E3",
    "A>0 likely": GREEN,
    "A>0 unlikely": YELLOW,
    "A<0 likely": SKY,
    "A<0 unlikely": PURPLE,
    "A=0": "#A0785A",
}
"""Colours of causes in a stack, which are not those of a direction."""

OTHERS = (GREEN, ORANGE, SKY, PURPLE, YELLOW, "#A0785A", "#44AA99", "#882255")
"""Colours of labels that have none of their own."""

MAX_LABELS = 6
"""Labels of a kind in one figure, those whose sums are largest in size."""

BAND = 0.18
"""Opacity of bands of ±1 standard error."""


@styled
def ledger(training: Training, kind: str | None = None) -> Figure:
    """Draw the causes of the predicted change, summed up over the measured steps and stacked, and the measured change.

    What raises the entropy is stacked above 0 and what lowers it below; the stacks' sum is the predicted change, drawn
    between thin lines one standard error away, over the draws of E.

    Args:
        training: from ``load_training``.
        kind: by whose labels the rollouts are divided; None takes the regions of tokens.
    """
    drawing = figure(7.2, 4.0)
    axes = drawing.subplots()
    steps = training.steps[STEP]
    edges = after_last(steps)
    parts = {name: _extended(values.cumsum()) for name, values in causes(training, kind).items()}
    parts = dict(sorted(parts.items(), key=lambda item: _rank(item[0])))
    colours = _colours(list(parts), CAUSES)
    for sign in (1, -1):
        base = np.zeros(len(edges))
        for name, values in parts.items():
            top = base + np.where(sign * values > 0, values, 0.0)
            axes.fill_between(edges, base, top, step="post", color=colours[name], lw=0)
            base = top
    _sum_lines(axes, training)
    for name in parts:
        axes.fill_between([], [], [], color=colours[name], label=drawable(name))
    for text in axes.legend(fontsize=7.5, **BESIDE).get_texts():
        literal(text)
    axes.set_title("How the change of entropy is made up, summed up over the measured steps")
    _label(axes, training)
    return drawing


@styled
def label_sums(training: Training, kind: str) -> Figure:
    """Draw the sum of each label of a kind over the measured steps, with bands of ±1 standard error where known.

    Args:
        training: from ``load_training``.
        kind: one of ``training.kinds``.
    """
    drawing = figure(7.2, 3.4)
    axes = drawing.subplots()
    series = dict(list(label_series(training, kind).items())[:MAX_LABELS])
    colours = _colours(list(series), CAUSES)
    for name, values in series.items():
        _line(axes, training.steps[STEP], values.cumulative(), colours[name], drawable(name))
    for text in axes.legend(fontsize=7.5, **BESIDE).get_texts():
        literal(text)
    axes.set_title(f"Influence by {kind}, summed up over the measured steps")
    _label(axes, training)
    return drawing


BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
"""Place of a legend at the right of the axes, where it covers nothing."""


def _sum_lines(axes: Axes, training: Training) -> None:
    """Draw the predicted sum between lines one standard error away, and the measured sum, over the stacks."""
    columns, edges = training.steps, after_last(training.steps[STEP])
    predicted = Series(columns["total"], columns["stderr"]).cumulative()
    label = "predicted, ±1 std. error" if np.isfinite(predicted.stderr).any() else "predicted"
    axes.step(edges, _extended(predicted.values), where="post", color=BLACK, label=label)
    for sign in (1, -1):
        # Lines and not a band, which would darken the colours of the stacks.
        edge = _extended(predicted.values + sign * predicted.stderr)
        axes.step(edges, edge, where="post", color=BLACK, linewidth=0.5)
    known = np.isfinite(columns["measured"])
    if training.splits_the_step and known.any():
        measured = np.where(known, columns["measured"], 0.0).cumsum()
        axes.step(edges, _extended(measured), where="post", color=BLACK, linestyle=":", label="measured")


def _rank(name: str) -> int:
    order = list(CAUSES)
    return order.index(name) if name in order else len(order)


def _colours(names: list[str], fixed: dict[str, str]) -> dict[str, str]:
    """Return a colour for each name: its own, or the next of the others."""
    others = [name for name in names if name not in fixed]
    return {name: fixed[name] if name in fixed else OTHERS[others.index(name) % len(OTHERS)] for name in names}


def after_last(steps: np.ndarray) -> np.ndarray:
    """Return the steps and one beyond the last, up to which the last sum is drawn."""
    return np.append(steps, steps[-1] + 1)


def _extended(values: np.ndarray) -> np.ndarray:
    """Return the values with the last one once more, for ``after_last``."""
    return np.append(values, values[-1])


def _line(axes: Axes, steps: np.ndarray, series: Series, colour: str, label: str) -> None:
    """Draw sums with a band of ±1 standard error where it is known."""
    edges, values, stderr = after_last(steps), _extended(series.values), _extended(series.stderr)
    axes.step(edges, values, where="post", color=colour, label=label)
    if np.isfinite(stderr).any():
        axes.fill_between(edges, values - stderr, values + stderr, step="post", color=colour, alpha=BAND, lw=0)


def _label(axes: Axes, training: Training) -> None:
    share = "all" if training.coverage == 1 else f"{training.coverage:.0%}"
    axes.set_xlabel(f"optimizer step ({len(training.steps[STEP])} measured, {share} of the steps)")
    axes.set_ylabel("change of entropy (nats)")
    zero_line(axes)
    axes.margins(x=0.01)
