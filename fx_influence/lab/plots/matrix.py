"""M, the part that each rollout of E has in each influence."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage

from fx_influence.lab.analysis.correlation import Column
from fx_influence.lab.analysis.covariates import recorded
from fx_influence.lab.plots.style import BLACK, DIVERGING, LOWERS, RAISES, UNIT, figure, styled, zero_line
from fx_influence.lab.results import EntropyInfluenceResults

SHOWN = 0.99
"""Quantile of |M_ai|, among those that are not 0, at which the colours end."""
MOST_SORTED = 1500
"""Leaves whose best order is searched; it costs their cube."""


@styled
def matrix(results: EntropyInfluenceResults, evaluation: int = 0) -> Figure:
    """Heat map of M_ai, rollouts of E by those of U, rows and columns in the order of a hierarchical clustering.

    Average linkage of Euclidean distances, leaves in the order that keeps neighbours near. Above it each column's
    influence, its sum, and the sign of its advantage. Raises ``ValueError`` for a run that stored no matrix.
    """
    m = results.evaluations[evaluation].matrix
    if m is None:
        raise ValueError("the run holds no matrix M; measure the step with matrix=True, or with fx-influence run")
    m = m.astype(float)
    rows, columns = _order(m), _order(m.T)
    largest = float(np.quantile(np.abs(m[m != 0]), SHOWN)) if m.any() else 1.0
    made = figure(7.6, 6.0)
    top, body = made.subplots(2, 1, height_ratios=[1, 5], sharex=True)
    _sums(top, m.sum(0)[columns], recorded(results, "advantage"), columns)
    image = body.imshow(
        m[rows][:, columns],
        cmap=DIVERGING,
        vmin=-largest,
        vmax=largest,
        aspect="auto",
        interpolation="nearest",
    )
    body.set_xlabel(f"{m.shape[1]} rollouts of U, clustered")
    body.set_ylabel(f"{m.shape[0]} rollouts of E, clustered")
    bar = made.colorbar(image, ax=body, extend="both", pad=0.01)
    bar.set_label(f"part in the influence ({UNIT})\ncolours end at the {SHOWN:.0%} quantile of |M|")
    return made


def _sums(axes: Axes, influence: np.ndarray, advantage: Column, order: np.ndarray) -> None:
    place = np.arange(len(influence))
    axes.bar(place, influence, width=1.0, color=np.where(influence > 0, RAISES, LOWERS).tolist())
    axes.set_ylabel("influence\n(sum)", fontsize=8)
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    axes.set_title("Each influence, the sum of its column; below, its parts by rollout of E")
    zero_line(axes)
    if not isinstance(advantage, str):
        known = advantage[order]
        where: dict[str, Any] = {"ha": "left", "va": "center", "transform": axes.transAxes, "in_layout": False}
        axes.text(1.005, -0.07, "sign of A", fontsize=7, **where)
        bottom = np.full(len(place), -0.07)
        for chosen, marker in ((known > 0, "+"), (known < 0, "_")):
            axes.plot(
                place[chosen],
                bottom[chosen],
                marker,
                color=BLACK,
                markersize=3,
                markeredgewidth=0.6,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )


def _order(vectors: np.ndarray) -> np.ndarray:
    if len(vectors) < 3:
        return np.arange(len(vectors))
    tree = linkage(vectors, method="average", optimal_ordering=len(vectors) <= MOST_SORTED)
    return np.asarray(leaves_list(tree))
