"""Influences of rollouts and tokens against their covariates, with a fitted line."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fx_influence.lab.analysis.correlation import Column, Row, correlation_rows
from fx_influence.lab.analysis.covariates import Tokens, prompts, recorded, rollout_covariates
from fx_influence.lab.analysis.token_correlations import token_correlations
from fx_influence.lab.plots.style import BLACK, GREEN, GREY, LOWERS, ORANGE, RAISES, UNIT, figure, styled, zero_line
from fx_influence.lab.results import EntropyInfluenceResults

MAX_POINTS = 20_000
"""Points of a panel; of more, a random subset of this size is drawn."""
MIN_FITTED = 8
"""Points of a panel below which no line is fitted to them."""
LABELS = {
    "advantage": "advantage",
    "reward": "reward",
    "completion_length": "completion length (tokens)",
    "mean_entropy": "mean entropy (nats per token)",
    "mean_logprob": "mean log π (nats per token)",
    "importance_weight": "importance weight π / π behaviour",
    "gradient_norm": "gradient norm |g|",
    "prompt_difficulty": "difficulty (1 − mean reward of prompt)",
    "logprob": "log π (nats)",
    "entropy": "entropy (nats)",
    "position": "position in the completion (token)",
    "covariance_proxy": "(log π − mean)(A − mean) (nats)",
}


@styled
def correlates(results: EntropyInfluenceResults, evaluation: int = 0) -> Figure:
    """Draw each rollout's influence against each covariate, with the least-squares line and Spearman's rho.

    rho has its 95% interval over the draw of prompts where there are five; a covariate that is constant or missing has
    neither. Fewer than eight points have no line.
    """
    influence = results.evaluations[evaluation].arrays["per_sequence"]
    covariates = rollout_covariates(results)
    rows = correlation_rows({"none": influence}, covariates, prompts(results), measures=("spearman",))
    drawing = figure(10.0, 5.2)
    grid = drawing.subplots(2, 4, sharey=True)
    for axes, row in zip(grid.flat, rows, strict=True):
        _panel(axes, covariates[row["with"]], influence, _colours(recorded(results, "advantage"), influence), row)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"influence ({UNIT})")
    drawing.suptitle("Influence of the rollouts: green A > 0, orange A < 0, grey A = 0", x=0.01, ha="left", fontsize=10)
    return drawing


@styled
def token_correlates(results: EntropyInfluenceResults, evaluation: int = 0) -> Figure:
    """Draw each token's influence against log pi, entropy, position and the covariance proxy, as ``correlates``.

    The influence is on a scale that is linear about 0 and logarithmic beyond, so that the fitted line is curved. Of
    more than 20,000 tokens a random subset is drawn; rho and the line are of all.
    """
    tokens = Tokens(results, evaluation)
    columns: Mapping[str, Column] = {
        "logprob": tokens.logprob,
        "entropy": tokens.entropy,
        "position": tokens.position,
        "covariance_proxy": tokens.proxy(),
    }
    rows = [row for row in token_correlations(tokens) if row["measure"] == "spearman"]
    drawing = figure(10.0, 3.2)
    grid = drawing.subplots(1, 4, sharey=True)
    for axes, row in zip(grid.flat, rows, strict=True):
        _panel(axes, columns[row["with"]], tokens.influence, _colours(tokens.advantage, tokens.influence), row)
    _scale(grid[0], float(np.abs(tokens.influence).max()))
    grid[0].set_ylabel(f"influence ({UNIT})")
    n = len(tokens.influence)
    subset = f" ({MAX_POINTS} of {n} drawn)" if n > MAX_POINTS else ""
    title = f"Influence of the tokens{subset}: green A > 0, orange A < 0, grey A = 0"
    drawing.suptitle(title, x=0.01, ha="left", fontsize=10)
    return drawing


def _scale(axes: Axes, largest: float) -> None:
    """Scale the influence over three decades on each side of 0, by asinh, which has no kink as symlog has."""
    if not largest:
        return
    top = math.floor(math.log10(largest))
    decades = [10.0**k for k in range(top - 2, top + 1)]
    ticks = [*(-x for x in reversed(decades)), 0.0, *decades]
    axes.set_yscale("asinh", linear_width=decades[0] / 3)
    axes.set_yticks(ticks, [f"{x:g}" for x in ticks], minor=False)
    axes.set_yticks([], minor=True)


def _colours(advantage: Column, influence: np.ndarray) -> np.ndarray:
    if isinstance(advantage, str):
        return np.where(influence > 0, RAISES, LOWERS)
    return np.where(advantage > 0, GREEN, np.where(advantage < 0, ORANGE, GREY))


def _panel(axes: Axes, values: Column, influence: np.ndarray, colours: np.ndarray, row: Row) -> None:
    """Draw one covariate, or the note of ``row`` where it has no correlation."""
    axes.set_xlabel(LABELS[row["with"]], fontsize=8)
    zero_line(axes)
    if row["value"] is None or isinstance(values, str):
        axes.text(
            0.5,
            0.6,
            textwrap.fill(row["note"].replace("_", " "), 26),
            transform=axes.transAxes,
            ha="center",
            fontsize=8,
        )
        axes.set_xticks([])
        return
    n = len(values)
    subset = np.random.default_rng(0).choice(n, MAX_POINTS, replace=False) if n > MAX_POINTS else np.arange(n)
    x, y, c = values[subset], influence[subset], colours[subset]
    axes.scatter(x, y, s=10, c=c, alpha=0.6, linewidths=0, rasterized=n > 2000)
    if n >= MIN_FITTED:
        slope, intercept = np.polyfit(values, influence, 1)
        x = np.linspace(values.min(), values.max(), 200)
        axes.plot(x, intercept + slope * x, color=BLACK, linewidth=1.2)
    interval = "" if row["low"] is None else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
    axes.set_title(f"ρ = {row['value']:+.2f}{interval}", fontsize=8.5)
