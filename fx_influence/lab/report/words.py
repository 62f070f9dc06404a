"""A run in words and small tables: what stands above the explorer, once for every E."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fx_influence.lab.health import Finding, health
from fx_influence.lab.report.numbers import Scale, with_error
from fx_influence.lab.results import EntropyInfluenceResults
from fx_influence.lab.table import printable


class Part(NamedTuple):
    """A row of the totals."""

    name: str
    value: str
    stderr: str
    step: str
    kind: str


class Totals(NamedTuple):
    """What the step is made of, and the units of its columns."""

    unit: str
    step_unit: str
    rows: list[Part]


class Section(NamedTuple):
    """What the page says of one E."""

    title: str
    headline: str
    notes: list[str]
    totals: Totals
    realised: list[tuple[str, str]]
    findings: list[Finding]


def title(results: EntropyInfluenceResults) -> str:
    """The run's name."""
    return printable(results.path.resolve().name)


def facts(results: EntropyInfluenceResults) -> list[str]:
    """Sizes and settings, a few words each."""
    s = results.summary
    step = [f"step {s['step']} of a training"] if "step" in s else []
    return [
        *step,
        f"{s['update_rollouts']:,} rollouts in U",
        f"{s['trainable_parameters']:,} trainable parameters",
        f"learning rate {s['lr']:g}",
    ]


def section(results: EntropyInfluenceResults, evaluation: int) -> Section:
    """The words on one E. Raises ``KeyError`` where the run's summary lacks a total."""
    own, lr = results.evaluations[evaluation].summary, results.summary["lr"]
    return Section(
        title=f"E {evaluation + 1}: {own['rollouts']:,} rollouts, entropy {own['entropy']:.4f} nats {_per(results)}",
        headline=_headline(own, lr, _per(results)),
        notes=_notes(results, evaluation),
        totals=_totals(own, lr),
        realised=[
            (name.replace("_", " "), "" if value is None else f"{value:.4g}".replace("-", "−"))
            for name, value in own.get("in_this_step", {}).items()
        ],
        findings=health(results, evaluation),
    )


def _per(results: EntropyInfluenceResults) -> str:
    return "per token" if getattr(results.plan, "normalize", "token") == "token" else "per rollout"


def _headline(own: dict[str, Any], lr: float, per: str) -> str:
    change = own["total"] * lr
    if not change:
        return f"To first order this step leaves the policy's entropy as it is, at {own['entropy']:.4f} nats {per}."
    verb = "lowers" if change < 0 else "raises"
    error = None if own["total_stderr"] is None else own["total_stderr"] * lr
    return f"This step {verb} the policy's entropy by {with_error(abs(change), error)} nats {per}, to first order."


def _notes(results: EntropyInfluenceResults, evaluation: int) -> list[str]:
    own, lr = results.evaluations[evaluation].summary, results.summary["lr"]
    delta = results.evaluations[evaluation].arrays["per_sequence"]
    up, down = delta[delta > 0], delta[delta < 0]
    notes = [
        f"Measured on E, {own['rollouts']:,} rollouts of the same policy, whose entropy is {own['entropy']:.4f} nats "
        f"{_per(results)}.",
        f"{len(up):,} rollouts raise it, by {up.sum() * lr:.2g} in all; {len(down):,} lower it, by "
        f"{-down.sum() * lr:.2g}.",
    ]
    if half := _half(delta):
        notes.append(f"{half:,} of the {len(delta):,} rollouts hold half of all influence, signs aside.")
    return notes


def _half(delta: np.ndarray) -> int:
    """How few of the values hold half of the sum of sizes; 0 where all are 0."""
    sizes = np.sort(np.abs(delta))[::-1].cumsum()
    return int(np.searchsorted(sizes, sizes[-1] / 2)) + 1 if len(sizes) and sizes[-1] else 0


def _totals(own: dict[str, Any], lr: float) -> Totals:
    rows = (
        ("Momentum", own["momentum"], None, ""),
        ("Weight decay", own["weight_decay"], None, ""),
        ("Baseline, both of these", own["baseline"], own.get("baseline_stderr"), "sum"),
        ("Rollouts, all together", own["sum_per_sequence"], own.get("sum_per_sequence_stderr"), ""),
        *([("Unattributed", own["unattributed"], None, "")] if own.get("unattributed") else []),
        ("Total", own["total"], own["total_stderr"], "total"),
    )
    sizes = [abs(x) for _, value, error, _ in rows for x in (value, error or 0.0)]
    unit, step = Scale.of(max(sizes)), Scale.of(max(sizes) * lr)
    return Totals(
        unit=unit.named("nats per unit lr"),
        step_unit=step.named("nats in this step"),
        rows=[
            Part(
                name,
                unit.text(value),
                "" if error is None else f"± {unit.text(error, '')}",
                step.text(value * lr),
                kind,
            )
            for name, value, error, kind in rows
        ],
    )
