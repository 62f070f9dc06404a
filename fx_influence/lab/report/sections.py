"""Sentences and tables of the page above the explorer, one section for every E."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fx_influence.core.display import printable
from fx_influence.estimators.stderr import interval_half_width
from fx_influence.lab.console.headline import Change, entropy_unit, headline, step_terms
from fx_influence.lab.console.numbers import Scale
from fx_influence.lab.health import Finding
from fx_influence.lab.results import EntropyInfluenceResults
from fx_influence.lab.waterfall import LIKELY, waterfall_columns


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


class Bar(NamedTuple):
    """A bar with its error bar, in hundredths of the drawing's width: where each begins and ends, and 0."""

    start: float
    width: float
    low: float
    high: float
    zero: float


class WaterfallRow(NamedTuple):
    """A row of the waterfall: text and bar; ``kind``: ``sum`` for totals, and ``unsure`` if its sign is not told."""

    name: str
    value: str
    stderr: str
    kind: str
    sign: str
    bar: Bar


class Waterfall(NamedTuple):
    """Terms of the step's change of the entropy, with predicted and measured change; ``note`` defines names."""

    unit: str
    rows: list[WaterfallRow]
    note: str


class Section(NamedTuple):
    """Section of the page on one E."""

    title: str
    headline: str
    waterfall: Waterfall
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
        waterfall=waterfall(results, evaluation, first.changes),
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


def waterfall(results: EntropyInfluenceResults, evaluation: int, changes: list[Change]) -> Waterfall:
    """Return the terms of the step one after another, then the predicted and the measured changes from 0, in nats.

    Args:
        results: a finished run.
        evaluation: number of E.
        changes: of the step, from ``headline``, the predicted one first.
    """
    lr, degrees = results.summary["lr"], results.evaluations[evaluation].degrees_of_freedom
    columns = waterfall_columns(results, evaluation)[:-1]
    terms = [(x.name, x.value * lr, x.stderr * lr, interval_half_width(x.stderr * lr, degrees)) for x in columns]
    sums = [(x.name.removesuffix(", importance sampling"), x.value, *_errors(x)) for x in changes]
    names, values, errors, half_widths = zip(*terms, *sums, strict=True)
    ends = np.array([*np.cumsum(values[: len(terms)]), *values[len(terms) :]])
    starts = ends - values
    low, high = ends - np.nan_to_num(errors), ends + np.nan_to_num(errors)
    left, right = min(0.0, starts.min(), low.min()), max(0.0, starts.max(), high.max())
    scale = Scale.of(max(np.abs(values).max(), np.nan_to_num(errors).max()))

    def place(x: float) -> float:
        """Return a position in hundredths of the width, with a margin on both sides."""
        return round(float(2 + 96 * (x - left) / ((right - left) or 1.0)), 2)

    rows = []
    for k, (name, value, error) in enumerate(zip(names, values, errors, strict=True)):
        begin, end = sorted((place(starts[k]), place(ends[k])))
        unsure = "" if np.isnan(error) or abs(value) > half_widths[k] else " unsure"
        rows.append(
            WaterfallRow(
                name,
                scale.text(value),
                "" if np.isnan(error) else f"± {scale.text(error, '')}",
                ("" if k < len(terms) else "sum") + unsure,
                "up" if value > 0 else "down",
                Bar(begin, round(end - begin, 2), place(low[k]), place(high[k]), place(0.0)),
            )
        )
    likely = any("likely" in name for name in names)
    return Waterfall(scale.named(f"nats {entropy_unit(results)}"), rows, LIKELY if likely else "")


def _errors(change: Change) -> tuple[float, float]:
    """Return the standard error of a change and the half-width of its 95% interval, NaN where they are not known."""
    error = np.nan if change.stderr is None else change.stderr
    return error, interval_half_width(error, change.degrees_of_freedom)


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
