"""What the step is made of: the waterfall from momentum to the total, and the rollouts' influences one by one."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fx_influence.estimators.stderr import cluster_stderr
from fx_influence.lab.analysis.covariates import prompts, recorded
from fx_influence.lab.plots.style import BLACK, GREY, LOWERS, RAISES, UNIT, drawable, figure, styled, zero_line
from fx_influence.lab.results import EntropyInfluenceResults, displayed_prompt

MOST_PROMPTS = 6
PROMPT = 22
"""Characters of a prompt that name its column."""


class WaterfallColumn(NamedTuple):
    """A column of the waterfall; ``stderr`` is NaN where it was not measured."""

    name: str
    value: float
    stderr: float


def waterfall_columns(
    results: EntropyInfluenceResults, evaluation: int = 0, by: str = "advantage"
) -> list[WaterfallColumn]:
    """Momentum, weight decay, groups of rollouts, what is unattributed and the total; all but the last add up to it.

    Nats per unit lr.

    ``by``: ``advantage``, groups by its sign and by mean log-prob above or below U's median; ``prompt``, the six
    prompts with the largest |sum| and the rest. Standard errors are over the draw of E: those of groups from M, of
    momentum and decay the jackknife at the smallest finite step; NaN where a run has neither.
    Raises ``ValueError`` for another ``by``.
    """
    found = results.evaluations[evaluation]
    summary, arrays = found.summary, found.arrays
    still = [
        WaterfallColumn(name.replace("_", " "), float(summary[name]), _finite_error(arrays, name))
        for name in ("momentum", "weight_decay")
    ]
    if summary["baseline"] != summary["momentum"] + summary["weight_decay"]:
        # Under preconditioner "jacobian" the baseline holds a share of the second moment's response too.
        still = [WaterfallColumn("baseline", float(summary["baseline"]), _known(summary.get("baseline_stderr")))]
    influence = arrays["per_sequence"]
    moving = [
        WaterfallColumn(name, float(influence[which].sum()), _group_error(results, evaluation, which))
        for name, which in _groups(results, influence, by).items()
        if which.any()
    ]
    if summary.get("unattributed"):
        moving.append(WaterfallColumn("unattributed", float(summary["unattributed"]), float("nan")))
    return [*still, *moving, WaterfallColumn("total", float(summary["total"]), _known(summary.get("total_stderr")))]


def _groups(results: EntropyInfluenceResults, influence: np.ndarray, by: str) -> dict[str, np.ndarray]:
    if by == "prompt":
        return _prompt_groups(results, influence)
    if by != "advantage":
        raise ValueError(f"by is {by!r}; use 'advantage' or 'prompt'")
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
    return {f"{name} ({int(which.sum())})": which for name, which in cells.items()}


def _prompt_groups(results: EntropyInfluenceResults, influence: np.ndarray) -> dict[str, np.ndarray]:
    index = prompts(results)
    order = np.argsort(-np.abs(np.bincount(index, influence)), kind="stable")
    first = np.unique(index, return_index=True)[1]
    chosen = {k: index == k for k in order[:MOST_PROMPTS].tolist()}
    named = {f"{_prompt_name(results, int(first[k]))} ({int(w.sum())})": w for k, w in chosen.items()}
    rest = ~np.isin(index, order[:MOST_PROMPTS])
    return {**named, f"other prompts ({int(rest.sum())})": rest}


def _prompt_name(results: EntropyInfluenceResults, i: int) -> str:
    record = results.sequences[i]
    prompt = displayed_prompt(record)
    return f"{record['prompt_id']}: {prompt if len(prompt) <= PROMPT else prompt[:PROMPT] + '…'}"


def _group_error(results: EntropyInfluenceResults, evaluation: int, which: np.ndarray) -> float:
    found = results.evaluations[evaluation]
    if found.matrix is None:
        return float("nan")
    rows = torch.from_numpy(found.matrix[:, which].sum(1, dtype=float))
    lengths = torch.tensor([float(_counted(r.completion_mask, len(r.completion_ids))) for r in found.rollouts])
    shares = lengths if results.plan.normalize == "token" else torch.ones_like(lengths)
    clusters = torch.unique(torch.tensor([r.group for r in found.rollouts]), return_inverse=True)[1]
    return float(cluster_stderr(rows, rows.sum(), shares / shares.sum(), clusters))


def _counted(mask: tuple[bool, ...] | None, length: int) -> int:
    return length if mask is None else sum(mask)


def _finite_error(arrays: dict[str, np.ndarray], name: str) -> float:
    if f"{name}_stderr" not in arrays:
        return float("nan")
    k = int(np.argmin(arrays["eta"]))
    return float(arrays[f"{name}_stderr"][k] / arrays["eta"][k])


def _known(value: float | None) -> float:
    return float("nan") if value is None else float(value)


@styled
def waterfall(results: EntropyInfluenceResults, evaluation: int = 0, by: str = "advantage") -> Figure:
    """From momentum and weight decay through groups of rollouts to the step's total, with standard errors.

    Nats per unit lr, on the right in this step. See ``waterfall_columns`` for ``by`` and the errors.
    """
    columns = waterfall_columns(results, evaluation, by)
    made = figure(max(6.5, 1.15 * len(columns)), 4.2)
    axes = made.subplots()
    ends = np.cumsum([part.value for part in columns[:-1]]).tolist()
    starts = [0.0, *ends[:-1], 0.0]
    tops = [*ends, columns[-1].value]
    for k, part in enumerate(columns):
        colour = GREY if k == len(columns) - 1 else RAISES if part.value > 0 else LOWERS
        axes.bar(k, part.value, bottom=starts[k], width=0.62, color=colour)
        axes.errorbar(k, tops[k], None if np.isnan(part.stderr) else part.stderr, color=BLACK, capsize=3, linewidth=1)
        if k < len(columns) - 1:
            axes.plot([k - 0.31, k + 1.31], [tops[k]] * 2, color=BLACK, linewidth=0.6)
    _label(axes, columns, starts, tops)
    axes.set_title("What the step does to the entropy, to first order")
    _in_this_step(axes, results.summary["lr"])
    if any(np.isnan(part.stderr) for part in columns):
        axes.set_xlabel("Where no error is drawn, the run does not hold it.", fontsize=8)
    return made


def _label(axes: Axes, columns: list[WaterfallColumn], starts: list[float], tops: list[float]) -> None:
    errors = np.nan_to_num([part.stderr for part in columns])
    span = max(
        np.max(np.maximum(starts, np.add(tops, errors))) - np.min(np.minimum(starts, np.subtract(tops, errors))), 1e-300
    )
    for k, part in enumerate(columns):
        top = max(starts[k], tops[k] + errors[k])
        axes.text(k, top + 0.015 * span, f"{part.value:+.3g}", ha="center", va="bottom", fontsize=8)
    names = [textwrap.fill(drawable(part.name), 14) for part in columns]
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
