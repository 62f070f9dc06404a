"""Sentences and tables of the page above the explorer, one section for every E."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fx_influence.lab.console.column_table import printable
from fx_influence.lab.console.headline import Change, entropy_unit, headline, step_terms
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
    """Terms of the step's total, and the units of the columns."""

    unit: str
    step_unit: str
    rows: list[Row]


class Changes(NamedTuple):
    """The step's change of the entropy, predicted and measured: the unit, and rows of (name, value, error bar)."""

    unit: str
    rows: list[tuple[str, str, str]]


class Section(NamedTuple):
    """Section of the page on one E."""

    title: str
    headline: str
    changes: Changes
    notes: list[str]
    totals: Totals
    logged: list[tuple[str, str]]
    findings: list[Finding]


def title(results: EntropyInfluenceResults) -> str:
    """Return the run's name."""
    return printable(results.path.resolve().name)


def facts(results: EntropyInfluenceResults) -> list[str]:
    """Return sizes and settings of the run, a few words each."""
    s = results.summary
    step = [f"step {s['step']} of a training run"] if "step" in s else []
    return [
        *step,
        f"{s['update_rollouts']:,} rollouts in U",
        f"{s['trainable_parameters']:,} trainable parameters",
        f"learning rate {s['lr']:g}",
    ]


def section(results: EntropyInfluenceResults, evaluation: int) -> Section:
    """Return the section on one E. Raises ``KeyError`` if the run's summary has no total."""
    summary, lr = results.evaluations[evaluation].summary, results.summary["lr"]
    first = headline(results, evaluation)
    entropy = f"{summary['entropy']:.4f} nats {entropy_unit(results)}"
    return Section(
        title=f"E {evaluation + 1}: {summary['rollouts']:,} rollouts, entropy {entropy}",
        headline=first.sentence,
        changes=_changes(first.changes, entropy_unit(results)),
        notes=_notes(results, evaluation),
        totals=_totals(summary, lr),
        logged=[
            (printable(name.replace("_", " ")), "" if value is None else f"{value:.4g}".replace("-", "−"))
            for name, value in summary.get("in_this_step", {}).items()
        ],
        findings=first.findings,
    )


def _notes(results: EntropyInfluenceResults, evaluation: int) -> list[str]:
    summary, lr = results.evaluations[evaluation].summary, results.summary["lr"]
    delta = results.evaluations[evaluation].arrays["per_sequence"]
    up, down = delta[delta > 0], delta[delta < 0]
    notes = [
        f"Estimated from E, {summary['rollouts']:,} rollouts of the same policy, whose entropy is "
        f"{summary['entropy']:.4f} nats {entropy_unit(results)}.",
        f"{len(up):,} rollouts raise it, by {up.sum() * lr:.2g} in total; {len(down):,} lower it, by "
        f"{-down.sum() * lr:.2g}.",
    ]
    if half := _half(delta):
        notes.append(f"{half:,} of the {len(delta):,} rollouts have half of the sum of |influence|.")
    return notes


def _half(delta: np.ndarray) -> int:
    """Return the smallest number of values with half of the sum of absolute values; 0 if all are 0."""
    sums = np.sort(np.abs(delta))[::-1].cumsum()
    return int(np.searchsorted(sums, sums[-1] / 2)) + 1 if len(sums) and sums[-1] else 0


def _changes(changes: list[Change], unit: str) -> Changes:
    scale = Scale.of(max(abs(x) for c in changes for x in (c.value, c.stderr or 0.0)))
    rows = [(c.name, scale.text(c.value), "" if c.stderr is None else f"± {scale.text(c.stderr, '')}") for c in changes]
    return Changes(scale.named(f"nats {unit}"), rows)


def _totals(summary: dict[str, Any], lr: float) -> Totals:
    terms = step_terms(summary)
    largest = max(abs(x) for term in terms for x in (term.value, term.stderr or 0.0))
    unit, step = Scale.of(largest), Scale.of(largest * lr)
    return Totals(
        unit=unit.named("nats per unit lr"),
        step_unit=step.named("nats in this step"),
        rows=[
            Row(
                term.name.capitalize(),
                unit.text(term.value),
                "" if term.stderr is None else f"± {unit.text(term.stderr, '')}",
                step.text(term.value * lr),
                term.kind,
            )
            for term in terms
        ],
    )
