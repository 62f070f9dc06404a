"""Waterfall of a step: from momentum and weight decay through groups of rollouts to the total."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fx_influence.estimators.deviations import NOTHING_LEFT_OUT, Deviations
from fx_influence.estimators.stderr import cluster_stderr
from fx_influence.lab.analysis.covariates import prompts, recorded
from fx_influence.lab.plots.style import BLACK, GREY, LOWERS, RAISES, UNIT, drawable, figure, styled, zero_line
from fx_influence.lab.results import EntropyInfluenceResults, displayed_prompt

MAX_PROMPTS = 6
PROMPT_CHARACTERS = 22
"""Characters of a prompt in the name of its column."""


class WaterfallColumn(NamedTuple):
    """A column of the waterfall; ``stderr`` is NaN where it was not measured."""

    name: str
    value: float
    stderr: float


def waterfall_columns(
    results: EntropyInfluenceResults, evaluation: int = 0, by: str = "advantage"
) -> list[WaterfallColumn]:
    """Return momentum, weight decay, groups of rollouts, the unattributed term and the total, which is their sum.

    Standard errors are over the draw of E: of groups from M, of momentum and decay by the jackknife at the smallest
    finite step; NaN where a run has neither.

    Args:
        results: a finished run.
        evaluation: index of the evaluation batch.
        by: ``advantage``, groups by its sign and by mean log-prob above or below U's median; ``prompt``, the six
            prompts with the largest |sum| and the rest.

    Returns:
        Columns in nats per unit lr.

    Raises:
        ValueError: for another ``by``.
    """
    evaluated = results.evaluations[evaluation]
    summary, arrays = evaluated.summary, evaluated.arrays
    baseline = [
        WaterfallColumn(name.replace("_", " "), float(summary[name]), _finite_error(arrays, name))
        for name in ("momentum", "weight_decay")
    ]
    if summary["baseline"] != summary["momentum"] + summary["weight_decay"]:
        # The "jacobian" preconditioner adds a share of the second moment's response to the baseline.
        baseline = [
            WaterfallColumn("baseline", float(summary["baseline"]), _nan_if_none(summary.get("baseline_stderr")))
        ]
    influence = arrays["per_sequence"]
    groups = [
        WaterfallColumn(name, float(influence[mask].sum()), _group_error(results, evaluation, mask))
        for name, mask in _groups(results, influence, by).items()
        if mask.any()
    ]
    if summary.get("unattributed"):
        groups.append(WaterfallColumn("unattributed", float(summary["unattributed"]), float("nan")))
    return [
        *baseline,
        *groups,
        WaterfallColumn("total", float(summary["total"]), _nan_if_none(summary.get("total_stderr"))),
    ]


def _groups(results: EntropyInfluenceResults, influence: np.ndarray, by: str) -> dict[str, np.ndarray]:
    if by == "prompt":
        return _prompt_groups(results, influence)
    if by != "advantage":
        raise ValueError(f"by is {by!r}; expected 'advantage' or 'prompt'")
    advantage, logprob = recorded(results, "advantage"), recorded(results, "mean_logprob")
    if isinstance(advantage, str) or isinstance(logprob, str):
        return {f"all {len(influence)} rollouts": np.ones(len(influence), dtype=bool)}
    likely = logprob >= np.median(logprob)
    cells = {
        "A > 0, likely": (advantage > 0) & likely,
        "A > 0, unlikely": (advantage > 0) & ~likely,
        "A < 0, likely": (advantage < 0) & likely,
        "A < 0, unlikely": (advantage < 0) & ~likely,
        "A = 0": advantage == 0,
    }
    return {f"{name} ({int(mask.sum())})": mask for name, mask in cells.items()}


def _prompt_groups(results: EntropyInfluenceResults, influence: np.ndarray) -> dict[str, np.ndarray]:
    index = prompts(results)
    order = np.argsort(-np.abs(np.bincount(index, influence)), kind="stable")
    first = np.unique(index, return_index=True)[1]
    masks = {k: index == k for k in order[:MAX_PROMPTS].tolist()}
    groups = {f"{_prompt_name(results, int(first[k]))} ({int(mask.sum())})": mask for k, mask in masks.items()}
    rest = ~np.isin(index, order[:MAX_PROMPTS])
    return {**groups, f"other prompts ({int(rest.sum())})": rest}


def _prompt_name(results: EntropyInfluenceResults, i: int) -> str:
    record = results.sequences[i]
    prompt = displayed_prompt(record)
    return f"{record['prompt_id']}: {prompt if len(prompt) <= PROMPT_CHARACTERS else prompt[:PROMPT_CHARACTERS] + '…'}"


def _group_error(results: EntropyInfluenceResults, evaluation: int, mask: np.ndarray) -> float:
    """Return the standard error over the draw of E of the summed influence of the rollouts in ``mask`` (n_u,)."""
    evaluated = results.evaluations[evaluation]
    if "deviations" in evaluated.arrays:
        deviations = torch.from_numpy(evaluated.arrays["deviations"])
        nothing_left_out = torch.full((deviations.shape[1],), NOTHING_LEFT_OUT)
        return float(Deviations(deviations, nothing_left_out).stderr_of_sums(torch.from_numpy(mask).long() - 1, 1)[0])
    # Runs of version 0.2 and before have the matrix alone, which leaves out that the H in E's centre is estimated.
    if evaluated.matrix is None:
        return float("nan")
    rows = torch.from_numpy(evaluated.matrix[:, mask].sum(1, dtype=float))
    lengths = torch.tensor([float(_tokens(r.completion_mask, len(r.completion_ids))) for r in evaluated.rollouts])
    shares = lengths if results.plan.normalize == "token" else torch.ones_like(lengths)
    clusters = torch.unique(torch.tensor([r.group for r in evaluated.rollouts]), return_inverse=True)[1]
    return float(cluster_stderr(rows, rows.sum(), shares / shares.sum(), clusters))


def _tokens(mask: tuple[bool, ...] | None, length: int) -> int:
    return length if mask is None else sum(mask)


def _finite_error(arrays: dict[str, np.ndarray], name: str) -> float:
    """Return the standard error of a direction at the smallest finite step, per unit lr."""
    if f"{name}_stderr" not in arrays:
        return float("nan")
    k = int(np.argmin(arrays["eta"]))
    return float(arrays[f"{name}_stderr"][k] / arrays["eta"][k])


def _nan_if_none(value: float | None) -> float:
    return float("nan") if value is None else float(value)


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
    if any(np.isnan(column.stderr) for column in columns):
        axes.set_xlabel("Where no error is drawn, the run does not have it.", fontsize=8)
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
