"""Heat map of the pairwise influence M of rollouts of U on rollouts of E."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import leaves_list, linkage

from fx_influence.lab.analysis.correlation import Column
from fx_influence.lab.analysis.covariates import recorded
from fx_influence.lab.plots.style import BLACK, DIVERGING, LOWERS, RAISES, UNIT, figure, styled, zero_line
from fx_influence.lab.results import EntropyInfluenceResults

COLOUR_QUANTILE = 0.99
"""Quantile of the nonzero |M_ai| at which the colours end."""
MAX_ORDERED = 1500
"""Rollouts up to which the optimal order of the leaves is computed, at cubic cost."""


@styled
def matrix(results: EntropyInfluenceResults, evaluation: int = 0) -> Figure:
    """Draw M_ai, rollouts of E by those of U, with rows and columns in the order of a hierarchical clustering.

    Average linkage of Euclidean distances, leaves in the order that minimises the distance of neighbours. Above it the
    sum of each column, which is the influence of that rollout, and the sign of its advantage.

    Raises:
        ValueError: for a run that stored no matrix.
    """
    m = results.evaluations[evaluation].matrix
    if m is None:
        raise ValueError(
            "the run has no matrix M; expected one. Measure the step with matrix=True, or with fx-influence run"
        )
    m = m.astype(float)
    rows, columns = _order(m), _order(m.T)
    largest = float(np.quantile(np.abs(m[m != 0]), COLOUR_QUANTILE)) if m.any() else 1.0
    drawing = figure(7.6, 6.0)
    top, body = drawing.subplots(2, 1, height_ratios=[1, 5], sharex=True)
    _sums(top, m.sum(0)[columns], recorded(results, "advantage"), columns)
    image = body.imshow(
        m[rows][:, columns],
        cmap=DIVERGING,
        vmin=-largest,
        vmax=largest,
        aspect="auto",
        interpolation="nearest",
    )
    for axis in (body.xaxis, body.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    body.set_xlabel(f"{m.shape[1]} rollouts of U, clustered")
    body.set_ylabel(f"{m.shape[0]} rollouts of E, clustered")
    bar = drawing.colorbar(image, ax=body, extend="both", pad=0.01)
    bar.set_label(f"contribution to the influence ({UNIT})\ncolours end at the {COLOUR_QUANTILE:.0%} quantile of |M|")
    return drawing


def _sums(axes: Axes, influence: np.ndarray, advantage: Column, order: np.ndarray) -> None:
    x = np.arange(len(influence))
    axes.bar(x, influence, width=1.0, color=np.where(influence > 0, RAISES, LOWERS).tolist())
    axes.set_ylabel("influence\n(sum)", fontsize=8)
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    axes.set_title("Each influence, the sum of its column; below, its contributions by rollout of E")
    zero_line(axes)
    if not isinstance(advantage, str):
        ordered = advantage[order]
        placement: dict[str, Any] = {"ha": "left", "va": "center", "transform": axes.transAxes, "in_layout": False}
        axes.text(1.005, -0.07, "sign of A", fontsize=7, **placement)
        bottom = np.full(len(x), -0.07)
        for mask, marker in ((ordered > 0, "+"), (ordered < 0, "_")):
            axes.plot(
                x[mask],
                bottom[mask],
                marker,
                color=BLACK,
                markersize=3,
                markeredgewidth=0.6,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )


def _order(vectors: np.ndarray) -> np.ndarray:
    """Return the order of the rows in a hierarchical clustering."""
    if len(vectors) < 3:
        return np.arange(len(vectors))
    tree = linkage(vectors, method="average", optimal_ordering=len(vectors) <= MAX_ORDERED)
    return np.asarray(leaves_list(tree))
