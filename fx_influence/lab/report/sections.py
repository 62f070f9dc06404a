"""A run in words and small tables: what stands above the explorer, once for every E."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fx_influence.lab.console.column_table import printable
from fx_influence.lab.console.headline import Change, headline, per, step_terms
from fx_influence.lab.console.numbers import Scale
from fx_influence.lab.health import Finding
from fx_influence.lab.results import EntropyInfluenceResults


class Row(NamedTuple):
    """A row of the totals, as text."""

    name: str
    value: str
    stderr: str
    step: str
    kind: str


class Totals(NamedTuple):
    """What the step is made of, and the units of its columns."""

    unit: str
    step_unit: str
    rows: list[Row]


class Changes(NamedTuple):
    """The step's change of the entropy, foretold and measured: the unit, and (name, value, error bar) a row."""

    unit: str
    rows: list[tuple[str, str, str]]


class Section(NamedTuple):
    """What the page says of one E."""

    title: str
    headline: str
    changes: Changes
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
    first = headline(results, evaluation)
    return Section(
        title=f"E {evaluation + 1}: {own['rollouts']:,} rollouts, entropy {own['entropy']:.4f} nats {per(results)}",
        headline=first.sentence,
        changes=_changes(first.changes, per(results)),
        notes=_notes(results, evaluation),
        totals=_totals(own, lr),
        realised=[
            (name.replace("_", " "), "" if value is None else f"{value:.4g}".replace("-", "−"))
            for name, value in own.get("in_this_step", {}).items()
        ],
        findings=first.findings,
    )


def _notes(results: EntropyInfluenceResults, evaluation: int) -> list[str]:
    own, lr = results.evaluations[evaluation].summary, results.summary["lr"]
    delta = results.evaluations[evaluation].arrays["per_sequence"]
    up, down = delta[delta > 0], delta[delta < 0]
    notes = [
        f"Measured on E, {own['rollouts']:,} rollouts of the same policy, whose entropy is {own['entropy']:.4f} nats "
        f"{per(results)}.",
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


def _changes(changes: list[Change], unit: str) -> Changes:
    scale = Scale.of(max(abs(x) for c in changes for x in (c.value, c.stderr or 0.0)))
    rows = [(c.name, scale.text(c.value), "" if c.stderr is None else f"± {scale.text(c.stderr, '')}") for c in changes]
    return Changes(scale.named(f"nats {unit}"), rows)


def _totals(own: dict[str, Any], lr: float) -> Totals:
    rows = step_terms(own)
    sizes = [abs(x) for part in rows for x in (part.value, part.stderr or 0.0)]
    unit, step = Scale.of(max(sizes)), Scale.of(max(sizes) * lr)
    return Totals(
        unit=unit.named("nats per unit lr"),
        step_unit=step.named("nats in this step"),
        rows=[
            Row(
                part.name.capitalize(),
                unit.text(part.value),
                "" if part.stderr is None else f"± {unit.text(part.stderr, '')}",
                step.text(part.value * lr),
                part.kind,
            )
            for part in rows
        ],
    )
