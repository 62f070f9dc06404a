"""Summarize the errors of the estimators, and write their tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.harness import format_interval, mean_interval

TARGET = 0.8
"""Share of the top tenth that suffices to be identified."""
BINS = (0.0, 0.05, 0.2, 0.5, 1.0, 100.0)
"""Bounds of the bins of noise shares in the table of the rule."""
FIELDS = ("squared_error", "spearman", "top")
"""Errors that are measured of every estimate."""


BARS = ("noise_share", "coverage")
"""Figures of the error bars, of some estimators."""
SLOPE = "slope"
"""Figure of some estimates: <estimate, truth> / <truth, truth>, 1 without bias in size."""


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the errors of all estimators, their ratios, and the rule."""
    return {"estimators": errors(runs), "beside": error_ratios(runs), "rule": rule(runs)}


def errors(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return means over seeds by policy, estimator, size and completions per prompt."""
    groups: dict[tuple[str, str, int, int], list[list[dict[str, float]]]] = {}
    for run in runs:
        by_key: dict[tuple[str, str, int, int], list[dict[str, float]]] = {}
        for state in run["found"]:
            for x in state["errors"]:
                by_key.setdefault((run["policy"], x["estimator"], x["each"], x["rollouts"]), []).append(x)
        for key, states in by_key.items():
            groups.setdefault(key, []).append(states)
    return [
        {
            "policy": policy,
            "estimator": estimator,
            "each": each,
            "rollouts": size,
            **{
                field: mean_interval([float(np.mean([x[field] for x in states])) for states in seeds])
                for field in (*FIELDS, *BARS, SLOPE)
                if field in seeds[0][0]
            },
        }
        for (policy, estimator, each, size), seeds in groups.items()
    ]


def geometric(values: Sequence[float]) -> dict[str, float] | None:
    """Return the geometric mean of ratios with its 95% interval, None for fewer than two."""
    logs = mean_interval([math.log(x) for x in values])
    if logs is None or logs["mean"] is None or logs["half_width"] is None:
        return None
    mean, width = logs["mean"], logs["half_width"]
    return {"mean": math.exp(mean), "low": math.exp(mean - width), "high": math.exp(mean + width)}


def error_ratios(runs: Sequence[Mapping[str, Any]], each: int = 2) -> list[dict[str, Any]]:
    """Return squared errors over the error of ``per_decision`` on as many rollouts, ``each`` to a prompt."""
    ratios: dict[tuple[str, str, int], list[float]] = {}
    for run in runs:
        for state in run["found"]:
            reference = {(x["each"], x["rollouts"]): x for x in state["errors"] if x["estimator"] == "per_decision"}
            for x in state["errors"]:
                way = f"{x['estimator']}, {x['each']} a prompt"
                ratio = x["squared_error"] / reference[each, x["rollouts"]]["squared_error"]
                if ratio != 1:
                    ratios.setdefault((run["policy"], way, x["rollouts"]), []).append(ratio)
    return [
        {"policy": policy, "way": way, "rollouts": size, "ratio": geometric(values)}
        for (policy, way, size), values in ratios.items()
    ]


def rule(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the share of the top tenth identified by share of noise, and the noise at which it is ``TARGET``.

    That noise is read off a line fitted over the logarithm of the noise, one for each training run. Only policies
    whose prompts are drawn enter, since error bars account for that draw.
    """
    by_run = [
        [(x["noise_share"], x["top"]) for state in run["found"] for x in state["errors"] if has_rule(x)]
        for run in runs
        if run["policy"] != "toy"
    ]
    crossings = []
    for points in by_run:
        slope, intercept = np.polyfit(np.log([share for share, _ in points]), [top for _, top in points], 1)
        crossings.append(math.exp((TARGET - intercept) / slope))
    bins = [
        {
            "above": low,
            "to": high,
            "found": mean_interval([top for points in by_run for share, top in points if low < share <= high]),
        }
        for low, high in pairwise(BINS)
    ]
    return {"at": geometric(crossings), "bins": bins}


def has_rule(x: Mapping[str, Any]) -> bool:
    """Return whether an estimate has error bars and no bias, which these would not hold."""
    return "noise_share" in x and x["estimator"] == "per_decision"


def markdown(report: Mapping[str, Any]) -> str:
    """Return the rule: the share of the top tenth identified by share of noise."""
    bins = [row for row in report["summary"]["rule"]["bins"] if row["found"]]
    if not bins:
        return ""
    lines = ["| share of noise | of the top tenth identified, with its sign |", "|---|---|"]
    for row in bins:
        to = f"{row['above']:.0%} to {row['to']:.0%}" if row["to"] <= 1 else f"above {row['above']:.0%}"
        lines.append(f"| {to} | {format_interval(row['found'], '.0f', 100)}% |")
    factor = format_factor(report["summary"]["rule"]["at"])
    return "\n".join([*lines, "", f"{TARGET:.0%} of the top tenth are identified at a share of noise of {factor}."])


def appendix(report: Mapping[str, Any]) -> str:
    """Return squared error and share of the top tenth by estimator and size of E, and the ratios of errors."""
    rows = report["summary"]["estimators"]
    sizes = sorted({x["rollouts"] for x in rows})
    lines = [f"| E of | {' | '.join(map(str, sizes))} |", "|---|" + "---|" * len(sizes)]
    for key in dict.fromkeys((x["policy"], x["estimator"], x["each"]) for x in rows):
        row = {x["rollouts"]: x for x in rows if (x["policy"], x["estimator"], x["each"]) == key}
        cells = (
            f"{format_interval(row[n]['squared_error'], '.2g')}; {format_interval(row[n]['top'], '.0f', 100)}%"
            if n in row
            else ""
            for n in sizes
        )
        lines.append(f"| {key[0]}, {key[1]}, {key[2]} a prompt | {' | '.join(cells)} |")
        for field, title in zip(BARS, ("share of noise, by error bars", "coverage of 95% intervals"), strict=True):
            if any(field in x for x in row.values()):
                cells = (f"{format_interval(row[n].get(field), '.0f', 100)}%" if n in row else "" for n in sizes)
                lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| squared error over that of per_decision, 2 a prompt | " + " | ".join(map(str, sizes)) + " |"]
    lines.append("|---|" + "---|" * len(sizes))
    compared = report["summary"]["beside"]
    for policy, way in dict.fromkeys((x["policy"], x["way"]) for x in compared):
        ratios = {x["rollouts"]: x["ratio"] for x in compared if (x["policy"], x["way"]) == (policy, way)}
        lines.append(f"| {policy}, {way} | {' | '.join(format_factor(ratios.get(n)) for n in sizes)} |")
    return "\n".join(lines)


def format_factor(ratio: Mapping[str, float] | None) -> str:
    """Return a geometric mean with its interval, empty for None."""
    return f"{ratio['mean']:.2g} ({ratio['low']:.2g} to {ratio['high']:.2g})" if ratio else ""
