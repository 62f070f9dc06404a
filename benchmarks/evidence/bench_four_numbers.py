"""Collect the four numbers that matter: cost, noise, coverage, and how often the signs of regions are told.

    python -m benchmarks four_numbers            writes results/four_numbers.json and its table in README.md; a second
    python -m benchmarks four_numbers --quick    the same, written nowhere

Each is stored by another benchmark; run it after any of ``trl_run``, ``frameworks``, ``estimators``, ``cross_fitting``,
``real_model``, and of ``real_cross_fitting`` and ``real_estimators``, which have no rows where they are not stored.
Before: E is sampled anew, with the estimator of the defaults. After: the step's own rollouts, and for noise the
estimator of the estimated share of the score term.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.harness import EVIDENCE, format_interval, parser, result_path, store
from benchmarks.real.bench_real_counterfactual import COMPLETIONS, PROMPTS
from benchmarks.real.pretrained_states import MODEL

NAME, PAGE = "bench_four_numbers", EVIDENCE
ROLLOUTS, EACH = 256, 2
"""Rollouts of E, and of each prompt in it, whose share of noise is shown."""
ESTIMATORS = {"before": "per_decision", "after": "estimated share of the score term, shrunk"}
"""Estimators of the shares of noise, as ``bench_estimators`` names them."""
KINDS = {"before": "fresh E", "after": "cross-fitted"}
"""Kinds of E of the other figures, as ``bench_cross_fitting`` names them."""
REAL_ESTIMATORS = "real_estimators"
WAY = "TRL"
"""Way of training whose cost is shown, as ``bench_frameworks`` names it."""
REAL_RUN, EVALUATIONS = "LoRA, float32", {"before": "fresh", "after": "batch"}
"""Training run of a pretrained model whose cost is shown, and its E, as ``bench_real_model`` names them."""

SHARES = {
    "noise": "noise in the squares of single influences",
    "covered": "true influences in their 95% intervals",
    "told": "signs of the four regions told, their mean",
    "right": "told and right",
}
"""Rows of the table that are shares, by figure."""


def report() -> dict[str, Any]:
    """Return the four numbers from the stored results: for each its policies, before and after."""
    compared = _compared("cross_fitting") | _compared("real_cross_fitting")
    figures: dict[str, Any] = {
        "cost": {"embedded, 64 rollouts": _cost(), "SmolLM2-135M, LoRA, 8 rollouts": _real_cost()},
        "noise": _noise() | _real_noise(),
    }
    return figures | {name: _before_and_after(name, compared) for name in ("covered", "told", "right")}


def markdown(figures: Mapping[str, Any]) -> str:
    """Return the table of the page."""
    lines = ["| number | policy, rollouts | before | after |", "|---|---|---|---|"]
    for policy, cost in figures["cost"].items():
        lines.append(
            f"| training with `every=1` over without | {policy} | {cost['before']:.1f} | {cost['after']:.1f} |"
        )
    for name, title in SHARES.items():
        for policy, share in figures[name].items():
            cells = " | ".join(f"{format_interval(share[when], '.0f', 100)}%" for when in ("before", "after"))
            lines.append(f"| {title} | {policy} | {cells} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__).parse_args(argv)
    figures = report()
    print(markdown(figures))
    if not arguments.quick:
        store(NAME, figures, {PAGE: {NAME: markdown(figures)}})
    return 0


def _stored(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(result_path(name).read_text(encoding="utf-8"))
    return result


def _cost() -> dict[str, float]:
    """Return the time of a training run that measures every step over that of one that measures none."""
    way = _stored("frameworks")["ways"][WAY]
    return {"before": _stored("trl_run")["cost"]["every=1"]["median"], "after": 1 + way["extra"] / way["plain"]}


def _real_cost() -> dict[str, float]:
    """Return the same of a pretrained model, by the processor time of its steps with unequal rewards."""
    runs = {run["evaluation"]: run for run in _stored("real_model")["runs"] if run["name"].startswith(REAL_RUN)}
    return {when: runs[evaluation]["summary"]["every_1_informative"] for when, evaluation in EVALUATIONS.items()}


def _before_and_after(name: str, compared: Mapping[str, Any]) -> dict[str, Any]:
    """Return a figure by policy, with a fresh E and on the step's own rollouts."""
    return {policy: {when: kinds[kind][name] for when, kind in KINDS.items()} for policy, kinds in compared.items()}


def _noise() -> dict[str, Any]:
    """Return the shares of noise by policy, of those that have both estimators."""
    rows = {
        (row["policy"], row["estimator"]): row["noise_share"]
        for row in _stored("estimators")["summary"]["estimators"]
        if (row["rollouts"], row["each"]) == (ROLLOUTS, EACH) and row.get("noise_share")
    }
    policies = [policy for policy, estimator in rows if estimator == ESTIMATORS["before"]]
    return {
        f"{policy}, E of {ROLLOUTS}": {when: rows[policy, name] for when, name in ESTIMATORS.items()}
        for policy in policies
        if (policy, ESTIMATORS["after"]) in rows
    }


def _real_noise() -> dict[str, Any]:
    """Return the same of a pretrained model, after: cross-fitted; empty where it is not stored."""
    if not result_path(REAL_ESTIMATORS).exists():
        return {}
    rows = {(row["policy"], row["estimator"]): row for row in _stored(REAL_ESTIMATORS)["summary"]["estimators"]}
    shares = {when: rows[f"{MODEL}, {KINDS[when]}", name]["noise_share"] for when, name in ESTIMATORS.items()}
    return {f"{MODEL}, {PROMPTS * COMPLETIONS}": shares}


def _compared(name: str) -> dict[str, dict[str, Any]]:
    """Return a stored comparison of kinds of E by policy and kind, empty where it is not stored."""
    if not result_path(name).exists():
        return {}
    stored, policies = _stored(name), dict[str, dict[str, Any]]()
    run = stored["runs"][0]
    count = run["prompts"] * run["each"] if "each" in run else PROMPTS * COMPLETIONS
    for row in stored["summary"]:
        policies.setdefault(f"{row['policy']}, {count}", {})[row["kind"]] = row
    return policies


if __name__ == "__main__":
    sys.exit(main())
