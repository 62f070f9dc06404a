"""Waterfall of a step: from momentum and weight decay through groups of rollouts to the total."""

from __future__ import annotations

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fx_influence.lab.plots.style import BLACK, GREY, LOWERS, RAISES, UNIT, drawable, figure, styled, zero_line
from fx_influence.lab.results import EntropyInfluenceResults
from fx_influence.lab.waterfall import LIKELY, WaterfallColumn, waterfall_columns


@styled
def waterfall(results: EntropyInfluenceResults, evaluation: int = 0, by: str = "advantage") -> Figure:
    """Draw the columns from momentum and weight decay through groups of rollouts to the step's total.

    The left axis is in nats per unit lr, the right one in nats in this step; bars have standard errors.

    Args:
        results: a finished run.
        evaluation: index of the evaluation batch.
        by: ``advantage`` or ``prompt``, see ``waterfall_columns``.
    """
    columns = waterfall_columns(results, evaluation, by)
    drawing = figure(max(6.5, 1.15 * len(columns)), 4.2)
    axes = drawing.subplots()
    ends = np.cumsum([column.value for column in columns[:-1]]).tolist()
    starts = [0.0, *ends[:-1], 0.0]
    tops = [*ends, columns[-1].value]
    for k, column in enumerate(columns):
        colour = GREY if k == len(columns) - 1 else RAISES if column.value > 0 else LOWERS
        axes.bar(k, column.value, bottom=starts[k], width=0.62, color=colour)
        axes.errorbar(
            k, tops[k], None if np.isnan(column.stderr) else column.stderr, color=BLACK, capsize=3, linewidth=1
        )
        if k < len(columns) - 1:
            axes.plot([k - 0.31, k + 1.31], [tops[k]] * 2, color=BLACK, linewidth=0.6)
    _label(axes, columns, starts, tops)
    axes.set_title("What the step does to the entropy, to first order")
    _in_this_step(axes, results.summary["lr"])
    notes = [LIKELY] if any("likely" in column.name for column in columns) else []
    if any(np.isnan(column.stderr) for column in columns):
        notes.append("Where no error is drawn, the run does not have it.")
    axes.set_xlabel("\n".join(notes), fontsize=8)
    return drawing


def _label(axes: Axes, columns: list[WaterfallColumn], starts: list[float], tops: list[float]) -> None:
    errors = np.nan_to_num([column.stderr for column in columns])
    span = max(
        np.max(np.maximum(starts, np.add(tops, errors))) - np.min(np.minimum(starts, np.subtract(tops, errors))), 1e-300
    )
    for k, column in enumerate(columns):
        top = max(starts[k], tops[k] + errors[k])
        axes.text(k, top + 0.015 * span, f"{column.value:+.3g}", ha="center", va="bottom", fontsize=8)
    names = [textwrap.fill(drawable(column.name), 14) for column in columns]
    axes.set_xticks(range(len(columns)), names, fontsize=8, parse_math=False)
    axes.use_sticky_edges = False
    axes.margins(y=0.1)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(f"change of entropy ({UNIT})\nblue raises, vermilion lowers; ±1 standard error over E")
    zero_line(axes)


def _in_this_step(axes: Axes, lr: float) -> None:
    if lr:
        right = axes.secondary_yaxis("right", functions=(lambda y: np.multiply(y, lr), lambda y: np.divide(y, lr)))
        right.set_ylabel(f"nats in this step (lr {lr:g})")
        right.yaxis.set_major_formatter(lambda y, _: f"{y:.2g}")
