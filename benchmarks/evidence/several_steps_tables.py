"""Summarize how influences over several steps predict the entropy at their end, and write their tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import format_interval, mean_interval

RANKED = {
    "window": "window",
    "window, exact": "window, exact ∇H",
    "window, no curvature": "window, no curvature",
    "window, clip frozen": "window, clip frozen",
    "window, frozen": "window, clip and denominators frozen",
    "first length": "window of 1 step",
    "share": "one step, frozen",
    "marginal": "one step, jacobian",
    "lifetime": "one step, lifetime",
    "sgd": "plain SGD",
    "covariance proxy": "covariance proxy",
    "ceiling": "ceiling",
}
"""Titles of predictors by their names in stored results."""
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
    """Return figures by policy, learning rate and length of the window: ranks, changes of entropy, and seconds."""
    groups: dict[tuple[str, float, int], list[list[dict[str, Any]]]] = {}
    for run in runs:
        for k in {x["length"]: None for window in run["found"] for x in window["lengths"]}:
            rows = [x for window in run["found"] for x in window["lengths"] if x["length"] == k]
            groups.setdefault((run["policy"], run["lr"], k), []).append(rows)
    timed = [window["seconds"] for run in runs for window in run["found"] if window["seconds"]]
    return {
        "lengths": [
            {"policy": policy, "lr": lr, "length": length, **_of_length(by_run)}
            for (policy, lr, length), by_run in groups.items()
        ],
        "seconds": {work: statistics.median(times[work] / times["training"] for times in timed) for work in WORKS},
    }


def _of_length(by_run: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Return figures of the windows of several runs; a run counts with its mean over its windows."""
    rows = [row for windows in by_run for row in windows]
    measured = np.array([row["realised"] for row in rows])
    return {
        "windows": len(rows),
        "effect": mean_interval([statistics.fmean(row["effect"] for row in windows) for windows in by_run]),
        "slope": mean_interval([statistics.fmean(row["slope"] for row in windows) for windows in by_run]),
        "ranks": {name: _mean_over_runs(by_run, name) for name in RANKED},
        "realised": mean_interval([statistics.fmean(row["realised"] for row in windows) for windows in by_run]),
        "explainable": _explained(measured, np.array([row["realised_stderr"] for row in rows])),
        "r2": {name: _explained(measured, measured - [row[name] for row in rows]) for name in PREDICTED},
        "sums": {
            name: mean_interval([statistics.fmean(row[name] for row in windows) for windows in by_run])
            for name in (*PREDICTED, *CAUSES)
        },
    }


def _mean_over_runs(by_run: Sequence[Sequence[dict[str, Any]]], name: str) -> dict[str, float | None] | None:
    ranks = [[row["ranks"][name] for row in windows if row["ranks"].get(name) is not None] for windows in by_run]
    return mean_interval([statistics.fmean(x) for x in ranks if x])


def _explained(measured: np.ndarray, errors: np.ndarray) -> float | None:
    """Return 1 - mean squared error / variance of the measured changes; None for fewer than three."""
    return float(1 - (errors**2).mean() / measured.var()) if len(measured) > 2 else None


def markdown(report: dict[str, Any]) -> str:
    """Return the tables of ranks, of changes of entropy, and of seconds."""
    rows = report["summary"]["lengths"]
    ranks = [
        f"| rank correlation with leaving one out: policy, lr, steps | {' | '.join(RANKED.values())} |",
        "|---|" + "---|" * len(RANKED),
    ]
    changes = [
        "| ΔH over the window in 1e-4 nats: policy, lr, steps | measured | "
        f"{' | '.join((*PREDICTED.values(), *CAUSES.values()))} | R² of the three | explainable |",
        "|---|" + "---|" * (3 + len(PREDICTED) + len(CAUSES)),
    ]
    for row in rows:
        title = f"{row['policy']}, {row['lr']:g}, {row['length']}"
        ranks.append(f"| {title} | {' | '.join(format_interval(row['ranks'][name], '+.2f') for name in RANKED)} |")
        sums = [row["realised"], *(row["sums"][name] for name in (*PREDICTED, *CAUSES))]
        cells = [format_interval(x, "+.2f", 1e4) for x in sums]
        r2 = ", ".join(_cell(row["r2"][name]) for name in PREDICTED)
        changes.append(f"| {title} | {' | '.join(cells)} | {r2} | {_cell(row['explainable'])} |")
    times = report["summary"]["seconds"]
    costs = [
        f"| processor seconds over those of the window's training, {len(WORKS)} calls | {' | '.join(WORKS)} |",
        "|---|" + "---|" * len(WORKS),
        f"| longest window, median | {' | '.join(f'{times[work]:.2g}' for work in WORKS)} |",
    ]
    return "\n\n".join("\n".join(table) for table in (ranks, changes, costs))


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"
