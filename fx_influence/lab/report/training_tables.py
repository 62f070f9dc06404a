"""Tables of a training run's page, as text."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from fx_influence.core.display import printable
from fx_influence.estimators.stderr import interval_half_width
from fx_influence.interop.ledger.file import STEP
from fx_influence.lab.console.numbers import Scale
from fx_influence.lab.training.account import (
    SOURCE_KIND,
    LabelSum,
    Term,
    account,
    degrees_of_freedom,
    label_sums,
    lifetime,
    strongest_labels,
)
from fx_influence.lab.training.load import Training
from fx_influence.lab.training.prompts import PromptSeries, returning_prompts
from fx_influence.lab.training.sentences import steps_measured

MAX_KINDS, MAX_SOURCES, MAX_ROLLOUTS, MAX_PROMPTS = 6, 5, 20, 20
"""Rows of the tables of kinds, sources, rollouts and prompts."""

STEP_COLUMNS = {
    "entropy": "entropy",
    "total": "predicted",
    "stderr": "± std. error",
    "measured": "measured",
    "rollouts": "rollouts",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "unattributed": "unattributed",
    "reward": "reward",
    "length": "length",
    "truncated": "truncated",
    "lr": "lr",
    "conditioning": "conditioning",
    "ess": "ess",
    "seconds": "seconds",
}
"""Columns of the table of steps, with their heads."""


class SumRow(NamedTuple):
    """A sum over the run as text; ``kind`` says how a table marks it: ``total``, ``unsure`` or nothing."""

    name: str
    value: str
    stderr: str
    note: str
    kind: str


class SumTable(NamedTuple):
    """Rows of sums in one unit."""

    unit: str
    rows: list[SumRow]


def training_facts(training: Training) -> list[str]:
    """Return sizes and settings of a training run, a few words each."""
    steps = training.steps
    lr, preconditioner = steps["lr"], training.settings.get("preconditioner", "frozen")
    rates = f"learning rate {lr.max():g}" if lr.min() == lr.max() else f"learning rate {lr.min():g} to {lr.max():g}"
    return [
        steps_measured(training),
        *([rates] if np.isfinite(lr).all() else []),
        *([f"{np.nanmean(steps['update_count']):,.0f} rollouts a step"] if _known(steps["update_count"]) else []),
        *([f"{np.nanmean(steps['seconds']):.2g} s to measure a step"] if _known(steps["seconds"]) else []),
        *([f"preconditioner {preconditioner}"] if preconditioner != "frozen" else []),
    ]


def account_table(training: Training) -> SumTable | None:
    """Return predicted change by terms, measured change and the difference; None where there is no account."""
    if not training.splits_the_step:
        return None
    summed = account(training)
    bound = " (± is an upper bound)" if summed.bounded_steps else ""
    rows = [
        *((term.name, term, "") for term in summed.terms),
        (summed.predicted.name, summed.predicted, "total"),
        (summed.measured.name, summed.measured, "total"),
        (summed.unexplained.name + bound, summed.unexplained, ""),
    ]
    return _table([(printable(name), term, "", kind) for name, term, kind in rows])


def kinds_table(training: Training) -> SumTable | None:
    """Return the strongest labels of all kinds but sources; None where there are none."""
    return _label_table(strongest_labels(training)[:MAX_KINDS])


def sources_table(training: Training) -> SumTable | None:
    """Return the strongest data sources; None where the ledger has none."""
    if SOURCE_KIND not in training.kinds:
        return None
    return _label_table(label_sums(training, SOURCE_KIND)[:MAX_SOURCES])


def lifetime_table(training: Training) -> SumTable | None:
    """Return the lifetime effects of the labels of one kind, their sum, and what rollouts and momentum did; or None."""
    summed = lifetime(training)
    if summed is None or not training.kinds:
        return None
    kind = "region" if "region" in training.kinds else training.kinds[0]
    labels = label_sums(training, kind, over_lifetime=True)[:MAX_KINDS]
    rows = [(_label_name(x), x.term, "", "") for x in labels]
    sums = [(summed.effects, "total"), (summed.realised, "total"), (summed.difference, "")]
    return _table([*rows, *((term.name, term, "", mark) for term, mark in sums)])


def strongest_of_run(training: Training) -> list[dict[str, Any]]:
    """Return the rollouts of all measured steps that move the entropy most, as the ledger has them."""
    return sorted(training.strongest, key=lambda r: -abs(r["influence"]))[:MAX_ROLLOUTS]


def strongest_rollouts(training: Training, steps_with_page: Set[int]) -> tuple[str, list[dict[str, Any]]]:
    """Return the unit, and the run's strongest rollouts as text, with links to themselves in the pages of their steps.

    Args:
        training: from ``load_training``.
        steps_with_page: numbers of the steps that have a page.
    """
    chosen = strongest_of_run(training)
    scale = Scale.of(max((abs(r["influence"]) for r in chosen), default=0.0))
    degrees = dict(zip(training.steps[STEP].tolist(), degrees_of_freedom(training).tolist(), strict=True))
    rows = []
    for rollout in chosen:
        error = rollout.get("stderr")
        sure = error is not None and abs(rollout["influence"]) > interval_half_width(error, degrees[rollout[STEP]])
        rows.append(
            {
                "step": rollout[STEP],
                "link": _link(rollout) if rollout[STEP] in steps_with_page else "",
                "id": printable(str(rollout["id"])),
                "influence": scale.text(rollout["influence"]),
                "stderr": "" if error is None else f"± {scale.text(error, '')}",
                "kind": "" if sure else "unsure",
                "reward": _short(rollout.get("reward")),
                "advantage": _short(rollout.get("advantage")),
                "prompt": printable(str(rollout.get("prompt", ""))),
                "completion": printable(str(rollout.get("completion", ""))),
            }
        )
    return scale.named("nats in its step"), rows


class PromptRow(NamedTuple):
    """A prompt that returns, as text; ``bars``: for each appearance the place, top and height of its bar and its sign.

    They are in hundredths of the drawing's width and height; the middle is 0.
    """

    prompt: str
    appearances: int
    value: str
    stderr: str
    rewards: str
    kind: str
    bars: list[tuple[float, float, float, str]]


class PromptTable(NamedTuple):
    """Prompts that return: the unit, those with the largest sums, and how many there are."""

    unit: str
    rows: list[PromptRow]
    total: int


def prompts_table(training: Training) -> PromptTable | None:
    """Return the returning prompts that move the entropy most over their appearances; None where no prompt returns."""
    returning = returning_prompts(training)
    if not returning:
        return None
    chosen = returning[:MAX_PROMPTS]
    scale = Scale.of(max(abs(x) for series in chosen for x in (series.term.value, np.nan_to_num(series.term.stderr))))
    largest = max(float(np.abs(series.influence).max()) for series in chosen)
    rows = [_prompt_row(series, scale, largest, training.last_step) for series in chosen]
    return PromptTable(scale.named("nats"), rows, len(returning))


def _prompt_row(series: PromptSeries, scale: Scale, largest: float, last_step: int) -> PromptRow:
    """Return a row; bars are on one scale for all prompts, ``largest`` half of the height."""
    heights = 50 * series.influence / (largest or 1.0)
    bars = [
        (round(100 * step / last_step, 2), round(50 - max(height, 0.0), 2), round(abs(height), 2), _sign(height))
        for step, height in zip(series.steps.tolist(), heights.tolist(), strict=True)
    ]
    known = series.reward[np.isfinite(series.reward)]
    return PromptRow(
        printable(series.prompt),
        len(series.steps),
        scale.text(series.term.value),
        "" if np.isnan(series.term.stderr) else f"± {scale.text(series.term.stderr, '')}",
        f"{_short(known[0])} → {_short(known[-1])}" if len(known) else "",
        "" if series.term.sign else "unsure",
        bars,
    )


def _sign(value: float) -> str:
    return "up" if value > 0 else "down"


def steps_table(training: Training) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the table of all measured steps, without columns that no step has."""
    names = [name for name in STEP_COLUMNS if _known(training.steps[name])]
    columns = [training.steps[name] for name in names]
    rows = [
        [str(step), *(_short(float(column[k])) for column in columns)] for k, step in enumerate(training.steps[STEP])
    ]
    return ["step", *(STEP_COLUMNS[name] for name in names)], rows


def _label_table(sums: list[LabelSum]) -> SumTable | None:
    return _table([(_label_name(x), x.term, f"{x.share:.0%}", "") for x in sums]) if sums else None


def _label_name(x: LabelSum) -> str:
    """Return a label with its kind, unless its name says it."""
    name = printable(x.term.name)
    return name if x.kind in ("region", "reward", "third", "advantage", SOURCE_KIND) else f"{printable(x.kind)}: {name}"


def _table(rows: list[tuple[str, Term, str, str]]) -> SumTable:
    """Return rows of (name, sum, note, kind) on one scale; a sum whose sign is not told is marked."""
    largest = max(abs(x) for _, term, _, _ in rows for x in (term.value, np.nan_to_num(term.stderr)))
    scale = Scale.of(largest)
    return SumTable(
        scale.named("nats"),
        [
            SumRow(
                name,
                scale.text(term.value),
                "" if np.isnan(term.stderr) else f"± {scale.text(term.stderr, '')}",
                note,
                kind or ("" if term.sign else "unsure"),
            )
            for name, term, note, kind in rows
        ],
    )


def step_directory(step: int) -> Path:
    """Return the path of a step's directory in that of the training run's measured steps."""
    return Path(f"step_{step:06d}")


def step_page(step: int) -> Path:
    """Return the path of a step's page in the directory of the training run's measured steps."""
    return step_directory(step) / "report" / "index.html"


def _link(rollout: dict[str, Any]) -> str:
    """Return the link from the run's page to a rollout in its step's page."""
    # Half of a surrogate pair has no place in an address; the step's page reads it as U+FFFD too.
    name = str(rollout["id"]).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return f"../{step_page(rollout[STEP]).as_posix()}#rollout={quote(name, safe='')}"


def _short(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.3g}".replace("-", "−")


def _known(column: np.ndarray) -> bool:
    return bool(np.isfinite(column).any())
