"""Tables and lines of a training run for a terminal: sentences, account, strongest kinds, checks, measured steps."""

from __future__ import annotations

import math

from rich.console import Console
from rich.text import Text

from fx_influence.core.display import printable
from fx_influence.interop.ledger.file import STEP
from fx_influence.lab.console.column_table import Column, ColumnTable
from fx_influence.lab.console.numbers import Scale
from fx_influence.lab.training.account import SOURCE_KIND, LabelSum, Term, account, label_sums, strongest_labels
from fx_influence.lab.training.health import training_health
from fx_influence.lab.training.load import Training
from fx_influence.lab.training.sentences import entropy_unit, training_sentences

MAX_LABELS = 6
"""Rows of the tables of kinds and of sources."""


def print_training(training: Training, console: Console) -> None:
    """Print the sentences, the account, the strongest kinds and sources, and the checks that need attention."""
    findings = training_health(training)
    for sentence in training_sentences(training, findings):
        console.print(Text(printable(sentence)))
    unit = f"nats {entropy_unit(training)}"
    if training.splits_the_step:
        summed = account(training)
        terms = [*summed.terms, summed.predicted, summed.measured, summed.unexplained]
        _print_sums("The account", "term", [("", term) for term in terms], unit, console)
    labels = strongest_labels(training)[:MAX_LABELS]
    _print_labels("Strongest kinds of rollouts and tokens", "label", labels, unit, console)
    if SOURCE_KIND in training.kinds:
        _print_labels("Sources", "source", label_sums(training, SOURCE_KIND)[:MAX_LABELS], unit, console)
    for finding in findings:
        if finding.level == "attention":
            console.print(Text(printable(f"! {finding.name}: {finding.text}")))


def step_line(training: Training, k: int) -> str:
    """Return a line on measured step number ``k``, counted from 0 in the order of the ledger.

    Example:
        >>> import numpy as np
        >>> from pathlib import Path
        >>> names = ("entropy", "total", "stderr", "measured", "rollouts", "momentum", "reward")
        >>> columns = {name: np.array([0.5]) for name in names} | {"step": np.array([10])}
        >>> step_line(Training(Path(), columns, {}, [], {}, {}), 0)
        'step 10  entropy 0.5  predicted +0.5 ± 0.5  measured +0.5  rollouts +0.5  momentum +0.5  reward 0.5'
    """
    columns = training.steps
    value = {name: float(columns[name][k]) for name in columns}
    words = [f"step {columns[STEP][k]}"]
    for name, title, sign in (
        ("entropy", "entropy", ""),
        ("total", "predicted", "+"),
        ("measured", "measured", "+"),
        ("rollouts", "rollouts", "+"),
        ("momentum", "momentum", "+"),
        ("reward", "reward", ""),
    ):
        if math.isfinite(value[name]):
            error = f" ± {value['stderr']:.2g}" if name == "total" and math.isfinite(value["stderr"]) else ""
            words.append(f"{title} {value[name]:{sign}.3g}{error}")
    return "  ".join(words).replace("-", "−")


def _print_labels(title: str, head: str, sums: list[LabelSum], unit: str, console: Console) -> None:
    _print_sums(title, head, [(x.kind, x.term) for x in sums], unit, console)


def _print_sums(title: str, head: str, rows: list[tuple[str, Term]], unit: str, console: Console) -> None:
    """Print a table of sums on one scale; ``rows``: the kind of a label or nothing, and the sum."""
    if not rows:
        return
    sizes = [abs(x) for _, term in rows for x in (term.value, term.stderr) if math.isfinite(x)]
    scale = Scale.of(max(sizes))
    columns = (Column(head, "name"), Column("kind", "name"), *map(Column, (scale.named(unit), "stderr", "sign")))
    cells = [
        (
            term.name,
            kind,
            scale.text(term.value),
            scale.text(term.stderr, "") if math.isfinite(term.stderr) else "",
            {1: "raises", -1: "lowers", 0: "not told"}[term.sign],
        )
        for kind, term in rows
    ]
    console.print(ColumnTable(title, columns, cells))
