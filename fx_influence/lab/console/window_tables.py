"""Tables of a training run's windows, as text."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fx_influence.lab.console.numbers import Scale
from fx_influence.lab.training.load import Training
from fx_influence.lab.training.windows import by_distance, compare_accounts, covered

NAMES = {"second_moment": "second moment", "weight_decay": "weight decay"}


class WindowRow(NamedTuple):
    """A term by both accounts, as text; ``kind`` marks the total."""

    name: str
    one_step: str
    window: str
    stderr: str
    difference: str
    kind: str


class WindowTable(NamedTuple):
    """Windows of a training run: a sentence, both accounts of those whose steps are measured, and all by distance.

    Attributes:
        facts: number and length of the windows, and how many the accounts are of.
        unit: of all numbers.
        accounts: terms by both accounts; empty where no window has all of its steps measured.
        distances: name, sum and standard error of the rollouts by their distance from the window's end.
    """

    facts: str
    unit: str
    accounts: list[WindowRow]
    distances: list[tuple[str, str, str]]


def window_table(training: Training) -> WindowTable | None:
    """Return the windows of a training run as text; None where it has none."""
    windows = training.windows
    lengths = sorted(set((windows.figures["last"] - windows.figures["first"] + 1).tolist()))
    if not lengths:
        return None
    count, measured = len(windows.figures["last"]), int(covered(windows, training.steps["step"]).sum())
    accounts, distances = compare_accounts(windows, training.steps), by_distance(windows)
    sizes = [abs(x) for row in accounts for x in (row.one_step, row.window, row.difference)]
    scale = Scale.of(float(np.nanmax([*sizes, *(abs(x) for _, x, _ in distances)])))
    rows = [
        WindowRow(
            NAMES.get(row.name, row.name),
            _text(scale, row.one_step),
            _text(scale, row.window),
            _error(scale, row.stderr),
            _text(scale, row.difference),
            "total" if row.name == "total" else "",
        )
        for row in accounts
    ]
    facts = f"{count} window{'s' if count > 1 else ''} of {' or '.join(map(str, lengths))} steps; both accounts are of "
    facts += f"the {measured} whose steps all are measured" if measured else "none, since no window has all measured"
    return WindowTable(
        facts,
        scale.named("nats"),
        rows,
        [(_distance(d), _text(scale, x), _error(scale, stderr)) for d, x, stderr in distances],
    )


def _distance(steps: int) -> str:
    return "the last step" if not steps else f"{steps} step{'s' if steps > 1 else ''} before"


def _text(scale: Scale, value: float) -> str:
    return "" if np.isnan(value) else scale.text(value)


def _error(scale: Scale, value: float) -> str:
    return "" if np.isnan(value) else f"± {scale.text(value, '')}"
