"""Summarise rank correlations of predictors over training states, and write their tables: a row for each predictor."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.counterfactual_tables import KINDS, LABELS, PROXIES, SIGNLESS
from benchmarks.harness import format_interval, mean_interval

REFERENCE = "share"
"""Predictor with which the others are compared: the default of ``fx.influence``."""
CEILING = "ceiling"
AS_FROZEN_CLIP = ("share, clip", "marginal, clip")
"""Predictors by state alone, since they rank as those with the clipping factor held fixed do."""
ENDINGS = {
    "": "",
    ", shrunk": ", shrunk baseline",
    ", half the score term": ", half the score term",
    ", estimated share": ", estimated share of the score term",
    ", no score term": ", no score term",
}
"""Endings of titles by those of the predictors' names that are estimators of the entropy's gradient."""
FRESH, OWN, TOKENS, NOTHING = "fresh rollouts", "the step's rollouts", "token probabilities", "nothing"
"""Needs of a predictor beside the step's gradients: rollouts as E, or less."""
NEEDS = {
    **{f"share{ending}": FRESH for ending in ENDINGS},
    **{f"cross-fitted{ending}": OWN for ending in ENDINGS},
    **dict.fromkeys(("marginal", "share, clip", "marginal, clip", "sgd"), FRESH),
    **dict.fromkeys(PROXIES, TOKENS),
    **dict.fromkeys(("advantage", *SIGNLESS), NOTHING),
}
"""Needs of each predictor, in the order of the table."""


def title(predictor: str) -> str:
    """Return the title of a predictor's row."""
    for stem in ("share", "cross-fitted"):
        if predictor.startswith(stem) and (ending := ENDINGS.get(predictor.removeprefix(stem))) is not None:
            return LABELS[stem] + ending
    return LABELS.get(predictor, predictor)


def predictors(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return means of every predictor's correlations over the states of all training runs, with 95% intervals.

    ``lead`` is the mean difference from ``REFERENCE`` within a state, whose interval is narrower since both see the
    same rollouts, and ``of_ceiling`` the mean over the mean ceiling of the same states.
    """
    states = [state for run in runs for state in run["found"]]
    rows = []
    for name in [*NEEDS, CEILING]:
        row: dict[str, Any] = {"predictor": name}
        for kind in KINDS:
            measured = [s[kind] for s in states if s[kind].get(name) is not None]
            if not measured:
                continue
            row[kind] = {"states": len(measured), "mean": mean_interval([x[name] for x in measured])}
            if name not in (REFERENCE, CEILING):
                row[kind]["lead"] = mean_interval([x[name] - x[REFERENCE] for x in measured])
            if kind != "size":
                row[kind]["of_ceiling"] = ratio([x[name] for x in measured], [x[CEILING] for x in measured])
        if len(row) > 1:
            rows.append(row)
    return rows


def ratio(values: Sequence[float], ceilings: Sequence[float]) -> float | None:
    """Return the mean of values over that of their ceilings, None where these are 0."""
    ceiling = statistics.fmean(ceilings)
    return statistics.fmean(values) / ceiling if ceiling > 0 else None


def by_predictor(report: Mapping[str, Any]) -> str:
    """Return the table of means over states, a row for each predictor, and one by training run."""
    heads = ["predictor", "needs"]
    for kind in ("loo", "lds"):
        heads += [KINDS[kind], "less frozen's", "of the ceiling"]
    lines = [f"| {' | '.join([*heads, KINDS['size']])} |", "|---" * (len(heads) + 1) + "|"]
    for row in report["predictors"]:
        name = row["predictor"]
        if name in AS_FROZEN_CLIP:
            continue
        cells = [title(name), NEEDS.get(name, "")]
        for kind in ("loo", "lds"):
            x = row.get(kind, {})
            share = x.get("of_ceiling") if name != CEILING else None
            cells += [format_interval(x.get("mean"), "+.2f"), format_interval(x.get("lead"), "+.2f")]
            cells.append("" if share is None else f"{share:.0%}")
        cells.append(format_interval(row.get("size", {}).get("mean"), "+.2f"))
        lines.append(f"| {' | '.join(cells)} |")
    states = sum(len(run["found"]) for run in report["runs"])
    return "\n\n".join([f"Means over {states} states:", "\n".join(lines), by_run(report)])


def by_run(report: Mapping[str, Any]) -> str:
    """Return the table of means over the states of each training run, which are too few for intervals."""
    runs = [*report["runs"], *report["earlier"]]
    rows = [{row["predictor"]: row for row in predictors([run])} for run in runs]
    kinds = ("loo", "lds")
    heads = [f"{run['policy']}, means over {len(run['found'])}: {KINDS[kind]}" for run in runs for kind in kinds]
    lines = [f"| predictor | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in (row["predictor"] for row in report["predictors"] if "lds" in row):
        if name not in AS_FROZEN_CLIP:
            of_runs = [row.get(name, {}).get(kind) for row in rows for kind in kinds]
            cells = (_cell(x["mean"]["mean"] if x else None) for x in of_runs)
            lines.append(f"| {title(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_state(report: Mapping[str, Any]) -> str:
    """Return the table of the states, and one of correlations for each kind of effect, a column for each state."""
    columns = [(run, state) for run in (*report["runs"], *report["earlier"]) for state in run["found"]]
    heads = [f"{run['policy']}, lr {run['lr']:g}, step {state['step']}" for run, state in columns]
    states = [
        "| state | ΔH of the step | effect of leaving one out, root mean square | its standard error | entropy of U |",
        "|---|---|---|---|---|",
    ]
    for head, (_, x) in zip(heads, columns, strict=True):
        entropy = f"{x['entropy']:.2f}" if "entropy" in x else ""
        states.append(f"| {head} | {x['delta_h']:+.2g} | {x['effect']:.2g} | {x['effect_stderr']:.2g} | {entropy} |")
    return "\n\n".join(["\n".join(states), *(_correlations(report, kind, columns, heads) for kind in KINDS)])


def _correlations(report: Mapping[str, Any], kind: str, columns: Sequence[Any], heads: Sequence[str]) -> str:
    lines = [f"| {KINDS[kind]} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for row in report["predictors"]:
        if kind in row:
            values = [state[kind].get(row["predictor"]) for _, state in columns]
            lines.append(f"| {title(row['predictor'])} | {' | '.join(map(_cell, values))} |")
    return "\n".join(lines)


def _cell(correlation: float | None) -> str:
    return "" if correlation is None else f"{correlation:+.2f}"
