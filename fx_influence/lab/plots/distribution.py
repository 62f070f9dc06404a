"""Distribution of the rollouts' influences."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fx_influence.lab.plots.style import GREY, LOWERS, RAISES, UNIT, figure, styled, zero_line
from fx_influence.lab.results import EntropyInfluenceResults


@styled
def distribution(results: EntropyInfluenceResults, evaluation: int = 0) -> Figure:
    """Draw the influences delta_i of U's rollouts: their histogram, and each by rank with its standard error."""
    arrays = results.evaluations[evaluation].arrays
    influence, stderr = arrays["per_sequence"], arrays["stderr"]
    drawing = figure(8.0, 3.6)
    left, right = drawing.subplots(1, 2, width_ratios=[1, 1.4])
    edges = np.histogram_bin_edges(influence, bins=min(41, max(9, len(influence) // 4)))
    sides = {"lower": influence < 0, "leave": influence == 0, "raise": influence > 0}
    left.hist(
        [influence[mask] for mask in sides.values()],
        edges.tolist(),
        stacked=True,
        color=[LOWERS, GREY, RAISES],
        label=[f"{int(mask.sum())} {name} the entropy" for name, mask in sides.items()],
    )
    left.set_xlabel(f"influence of a rollout ({UNIT})")
    left.set_ylabel("rollouts")
    left.legend(fontsize=8)
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_title("Distribution")
    _by_rank(right, influence, stderr, int(results.evaluations[evaluation].told().sum()))
    return drawing


def _by_rank(axes: Axes, influence: np.ndarray, stderr: np.ndarray, told: int) -> None:
    """Draw the influences by rank; ``told``: how many have a sign that their intervals tell."""
    order = np.argsort(influence, kind="stable")
    rank, values, errors = np.arange(len(order)), influence[order], stderr[order]
    if not np.isnan(errors).any():
        axes.errorbar(
            rank, values, errors, fmt="none", ecolor="#B0B0B0", elinewidth=0.9, label="±1 standard error over E"
        )
    axes.scatter(rank, values, s=9, c=np.where(values > 0, RAISES, np.where(values < 0, LOWERS, GREY)), zorder=3)
    note = f"95% intervals of {told} of {len(order)} exclude 0"
    if np.isnan(errors).any():
        note = "no standard errors"
    axes.set_title(f"By rank: {note}")
    axes.set_xlabel("rollouts of U by influence (rank)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"influence ({UNIT})")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="upper left")
    zero_line(axes)
