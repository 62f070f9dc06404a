"""Summarize how influences over several steps predict the entropy at their end, and write their tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import format_interval, mean_interval

RANKED = {
    "window, same E": "window, on the E that measures",
    "window, no curvature, same E": "the same without curvature",
    "share, same E": "one step, frozen, on the E that measures",
    "window": "window, on another E",
    "window, frozen": "window, clip and denominators frozen",
    "first length": "window of 1 step",
    "share": "one step, frozen or lifetime",
    "share, clip": "one step, frozen, clip differentiated",
    "marginal": "one step, jacobian",
    "sgd": "plain SGD",
    "covariance proxy": "covariance proxy",
    "exact tabular": "exact tabular",
    "STEER": "STEER",
    "REPO": "REPO",
    "relative surprisal": "relative surprisal",
    "GRPODropout": "GRPODropout",
    "advantage": "advantage",
    "ceiling": "ceiling",
}
"""Titles of predictors by their names in stored results; "lifetime" is "share" times one number, so it ranks alike."""
SAME_E = ("window, same E", "window, no curvature, same E", "share, same E")
COMPARED = (*SAME_E, "window", "share", "marginal", "sgd", "covariance proxy")
"""Predictors of the table over all sampled policies."""
EXACT = "toy"
"""The policy whose entropies are exact; the others are summarized in one row as well."""
PREDICTED = {
    "steps_total": "sum of steps",
    "both_ends": "sum of steps, from both ends",
    "window_total": "window's account",
}
CAUSES = {
    "steps_momentum": "momentum, sum of steps",
    "steps_rollouts": "rollouts, sum of steps",
    "window_momentum": "momentum before the window",
    "window_rollouts": "rollouts, window's account",
}
WORKS = ("influences", "no curvature", "last step's rollouts", "error bars")


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return figures by learning rate and length, over sampled policies and by policy, and the seconds of each work."""
    sampled = list(dict.fromkeys(run["policy"] for run in runs if run["policy"] != EXACT))
    pooled = [{**run, "policy": " and ".join(sampled)} for run in runs if run["policy"] != EXACT]
    exact = [run for run in runs if run["policy"] == EXACT]
    timed = [window["seconds"] for run in runs for window in run["found"] if window["seconds"]]
    return {
        "pooled": _by_length(pooled + exact),
        "lengths": _by_length(runs),
        "seconds": {
            work: statistics.median(times[work] / times["training"] for times in timed) for work in WORKS if timed
        },
    }


def _by_length(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return figures by policy, learning rate and length of the window."""
    groups: dict[tuple[str, float, int], list[list[dict[str, Any]]]] = {}
    for run in sorted(runs, key=lambda run: (run["policy"] == EXACT, run["policy"], run["lr"])):
        for k in {x["length"]: None for window in run["found"] for x in window["lengths"]}:
            rows = [x for window in run["found"] for x in window["lengths"] if x["length"] == k]
            groups.setdefault((run["policy"], run["lr"], k), []).append(rows)
    return [
        {"policy": policy, "lr": lr, "length": length, **_of_length(by_run)}
        for (policy, lr, length), by_run in groups.items()
    ]


def _of_length(by_run: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Return figures of the windows of several runs; a run counts with its mean over its windows."""
    rows = [row for windows in by_run for row in windows]
    measured = np.array([row["realised"] for row in rows])
    predicted = {name: np.array([row[name] for row in rows]) for name in PREDICTED}
    return {
        "windows": len(rows),
        "effect": mean_interval([statistics.fmean(row["effect"] for row in windows) for windows in by_run]),
        "slope": mean_interval([statistics.fmean(row["slope"] for row in windows) for windows in by_run]),
        "ranks": {name: _mean_over_runs(by_run, name) for name in RANKED},
        "gain": _mean_gain(by_run),
        "realised": mean_interval([statistics.fmean(row["realised"] for row in windows) for windows in by_run]),
        "explainable": _explained(measured, np.array([row["realised_stderr"] for row in rows])),
        "r2": {name: _explained(measured, measured - x) for name, x in predicted.items()},
        "slopes": {name: float(measured @ x / (x @ x)) for name, x in predicted.items() if x.any()},
        "sums": {
            name: mean_interval([statistics.fmean(row[name] for row in windows) for windows in by_run])
            for name in (*PREDICTED, *CAUSES)
        },
    }


def _mean_over_runs(by_run: Sequence[Sequence[dict[str, Any]]], name: str) -> dict[str, float | None] | None:
    ranks = [[row["ranks"][name] for row in windows if row["ranks"].get(name) is not None] for windows in by_run]
    return mean_interval([statistics.fmean(x) for x in ranks if x])


def _mean_gain(by_run: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float | None] | None:
    """Return by how much the window's rank correlation exceeds that of one step, both on the E that measures."""
    pairs = [[(row["ranks"][SAME_E[0]], row["ranks"][SAME_E[-1]]) for row in windows] for windows in by_run]
    gains = [[over - one for over, one in x if over is not None and one is not None] for x in pairs]
    return mean_interval([statistics.fmean(x) for x in gains if x])


def _explained(measured: np.ndarray, errors: np.ndarray) -> float | None:
    """Return 1 - mean squared error / variance of the measured changes; None for fewer than three."""
    return float(1 - (errors**2).mean() / measured.var()) if len(measured) > 2 else None


def markdown(report: dict[str, Any]) -> str:
    """Return the tables of ranks, of changes of entropy, and of seconds, over all sampled policies."""
    ranks = [
        "| rank correlation with leaving one out: policy, lr, steps | windows | "
        f"{' | '.join(RANKED[name] for name in (*COMPARED, 'ceiling'))} | gain of the window over one step, on the E "
        "that measures | window on another E / ceiling |",
        "|---|" + "---|" * (len(COMPARED) + 4),
    ]
    changes = [
        "| ΔH over the window in 1e-4 nats: policy, lr, steps | measured | "
        f"{' | '.join((*PREDICTED.values(), *CAUSES.values()))} | R² of the three | explainable | "
        "measured / predicted, the three |",
        "|---|" + "---|" * (4 + len(PREDICTED) + len(CAUSES)),
    ]
    for row in report["summary"]["pooled"]:
        cells = [format_interval(row["ranks"][name], "+.2f") for name in (*COMPARED, "ceiling")]
        reached = _ratio(row["ranks"]["window"], row["ranks"]["ceiling"])
        cells = [_title(row), str(row["windows"]), *cells, format_interval(row["gain"], "+.2f"), reached]
        ranks.append(f"| {' | '.join(cells)} |")
        sums = [row["realised"], *(row["sums"][name] for name in (*PREDICTED, *CAUSES))]
        cells = [format_interval(x, "+.2f", 1e4) for x in sums]
        r2, slopes = (", ".join(_cell(row[key].get(name)) for name in PREDICTED) for key in ("r2", "slopes"))
        changes.append(f"| {_title(row)} | {' | '.join(cells)} | {r2} | {_cell(row['explainable'])} | {slopes} |")
    times = report["summary"]["seconds"]
    costs = [
        f"| processor seconds over those of the window's training, {len(WORKS)} calls | {' | '.join(WORKS)} |",
        "|---|" + "---|" * len(WORKS),
        f"| longest window, median | {' | '.join(f'{x:.2g}' for x in times.values())} |",
    ]
    return "\n\n".join("\n".join(table) for table in (ranks, changes, *([costs] if times else [])))


def appendix(report: dict[str, Any]) -> str:
    """Return the table of ranks by policy, of every predictor, with the effect's size in 1e-6 nats."""
    lines = [
        f"| rank correlation with leaving one out: policy, lr, steps | {' | '.join(RANKED.values())} | "
        "effect, 1e-6 nats | effect / window's |",
        "|---|" + "---|" * (len(RANKED) + 2),
    ]
    for row in report["summary"]["lengths"]:
        cells = [format_interval(row["ranks"][name], "+.2f") for name in RANKED]
        cells += [format_interval(row["effect"], ".2g", 1e6), format_interval(row["slope"], "+.2f")]
        lines.append(f"| {_title(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _title(row: dict[str, Any]) -> str:
    return f"{row['policy']}, {row['lr']:g}, {row['length']}"


def _ratio(a: dict[str, float | None] | None, b: dict[str, float | None] | None) -> str:
    """Return the ratio of two means as a cell, empty where there is none."""
    if a is None or b is None or a["mean"] is None or not b["mean"]:
        return ""
    return f"{a['mean'] / b['mean']:.2f}"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"
