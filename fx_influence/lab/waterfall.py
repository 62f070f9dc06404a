"""Split a step's total into momentum, weight decay and groups of rollouts, each with its standard error."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from fx_influence.estimators.stderr import cluster_stderr
from fx_influence.lab.analysis.covariates import prompts, recorded
from fx_influence.lab.results import EntropyInfluenceResults, displayed_prompt

MAX_PROMPTS = 6
PROMPT_CHARACTERS = 22
"""Characters of a prompt in the name of its column."""

LIKELY = "Likely: the mean log-probability of a rollout's tokens is not below the median over U."
"""Definition of the groups of ``by="advantage"``, for whoever shows them."""


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
    deviations = evaluated.deviations()
    if deviations is not None:
        return float(deviations.stderr_of_sums(torch.from_numpy(mask).long() - 1, 1)[0])
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
