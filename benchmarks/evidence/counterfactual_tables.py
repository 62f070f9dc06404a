"""Summarize the rank correlations of the predictors with measured effects, and write their tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import format_interval, mean_interval

PHASES = {"step 1": range(1, 2), "later": range(2, 10**6)}
REGIMES = {"lr to 1e-4": (0.0, 1e-4), "lr 1e-3": (1e-4, 1.0)}
CANDIDATES = ("share", "marginal", "share, clip", "marginal, clip", "sgd", "covariance proxy", "advantage")
"""Predictors of which the best is named."""
SIGNLESS = ("size of advantage", "gradient norm", "length")
"""Predictors of the size of an effect without its sign."""
KINDS = {"loo": "leaving one out", "lds": "half the batch", "size": "size of leaving one out"}
LABELS = {
    "share": "frozen",
    "share, exact": "frozen, exact",
    "cross-fitted": "frozen, cross-fitted",
    "marginal": "jacobian",
    "share, clip": "frozen, clip differentiated",
    "marginal, clip": "jacobian, clip differentiated",
    "sgd": "plain SGD",
}
"""Titles of predictors by their names in stored results."""
INFLUENCES = ("share", "share, exact", "cross-fitted", "marginal", "share, clip", "marginal, clip", "sgd")
PROXIES = ("covariance proxy", "exact tabular", "STEER", "REPO", "relative surprisal", "GRPODropout")
"""Predictors from ``fx.proxies``; a table has the columns of those that its results hold."""
SIGNED = (*INFLUENCES, *PROXIES, "advantage", "ceiling")
COLUMNS = {"loo": SIGNED, "lds": SIGNED, "size": (*INFLUENCES, *PROXIES, *SIGNLESS)}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return figures of every state, and of the first step and of all later ones."""
    return {"states": of_states(runs), "phases": of_phases(runs)}


def of_phases(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means with intervals over the training runs of all policies; a run counts with its mean over a phase.

    ``best`` lists the predictor with the highest mean, and those below it by no more than the interval of the
    difference.
    """
    rows = []
    for regime, (above, to) in REGIMES.items():
        for phase, steps in PHASES.items():
            runs_states = [[s for s in run["found"] if s["step"] in steps] for run in runs if above < run["lr"] <= to]
            if not any(runs_states):
                continue
            row: dict[str, Any] = {"regime": regime, "phase": phase, "trainings": sum(map(bool, runs_states))}
            for kind in ("loo", "lds"):
                means = {name: _means(runs_states, kind, name) for name in (*CANDIDATES, "ceiling")}
                row[kind] = {name: mean_interval(list(values.values())) for name, values in means.items()}
                row[kind]["best"] = _best({name: means[name] for name in CANDIDATES})
            rows.append(row)
    return rows


def _means(runs_states: Sequence[Sequence[dict[str, Any]]], kind: str, name: str) -> dict[int, float]:
    by_run = {
        k: [s[kind][name] for s in states if s[kind].get(name) is not None] for k, states in enumerate(runs_states)
    }
    return {k: statistics.fmean(values) for k, values in by_run.items() if values}


def _best(means: dict[str, dict[int, float]]) -> list[str]:
    defined = {name: values for name, values in means.items() if values}
    first = max(defined, key=lambda name: statistics.fmean(defined[name].values()))
    best = [first]
    for name in defined.keys() - {first}:
        differences = [x - defined[name][k] for k, x in defined[first].items() if k in defined[name]]
        gap = mean_interval(differences)
        if gap is None or gap["mean"] is None or gap["half_width"] is None or gap["mean"] <= gap["half_width"]:
            best.append(name)
    return sorted(best, key=list(CANDIDATES).index)


def of_states(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means over seeds with 95% intervals, by policy, learning rate and step."""
    groups: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for run in runs:
        for state in run["found"]:
            groups.setdefault((run["policy"], run["lr"], state["step"]), []).append(state)
    return [
        {
            "policy": policy,
            "lr": lr,
            "step": step,
            "seeds": len(states),
            **{name: mean_interval([s[name] for s in states]) for name in ("delta_h", "effect", "effect_stderr")},
            **{
                kind: {
                    name: mean_interval([s[kind][name] for s in states if s[kind][name] is not None])
                    for name in states[0][kind]
                }
                for kind in KINDS
            },
            # Differences within a state, whose interval is narrower since both predictors see the same rollouts.
            **{f"share_less_sgd_{kind}": mean_interval(_differences(states, kind)) for kind in ("loo", "lds")},
        }
        for (policy, lr, step), states in sorted(groups.items(), key=lambda item: item[0])
    ]


def _differences(states: Sequence[dict[str, Any]], kind: str) -> list[float]:
    pairs = [(s[kind]["share"], s[kind]["sgd"]) for s in states]
    return [share - sgd for share, sgd in pairs if share is not None and sgd is not None]


def appendix(report: dict[str, Any]) -> str:
    """Return for each kind of effect a table by policy, learning rate and step."""
    tables = []
    states = report["summary"]["states"]
    for kind, title in KINDS.items():
        names = [name for name in COLUMNS[kind] if any(name in row[kind] for row in states)]
        lines = [
            f"| {title}: policy, lr, step | {' | '.join(LABELS.get(n, n) for n in names)} |",
            "|---|" + "---|" * len(names),
        ]
        for row in states:
            cells = (format_interval(row[kind].get(name), "+.2f") for name in names)
            lines.append(f"| {row['policy']}, {row['lr']:g}, {row['step']} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def markdown(report: dict[str, Any]) -> str:
    """Return rank correlations at the first step and later, and the predictors to use."""
    phases = report["summary"]["phases"]
    names = [name for name in (*CANDIDATES, "ceiling") if any(row["loo"].get(name) for row in phases)]
    titles = ["steps", "effect of", *(LABELS.get(name, name) for name in names), "use"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in phases:
        for kind in ("loo", "lds"):
            cells = (format_interval(row[kind].get(name), "+.2f") for name in names)
            use = ", ".join(LABELS.get(name, name) for name in row[kind]["best"])
            title = f"{row['phase']}, {row['regime']} ({row['trainings']} training runs)"
            lines.append(f"| {title} | {KINDS[kind]} | {' | '.join(cells)} | {use} |")
    return "\n".join(lines)
