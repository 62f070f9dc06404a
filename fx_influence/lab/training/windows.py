"""The windows of a training run as columns, and their account beside that of single steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fx_influence.interop.ledger.entry import DEGREES
from fx_influence.interop.ledger.file import STEP, WINDOW

FIGURES = (
    *("rollouts", "rollouts_stderr", "momentum", "momentum_stderr", "second_moment", "second_moment_stderr"),
    *("weight_decay", "total", "total_stderr", "residual", "absolute", "ess", "replay_error", "bytes", "seconds"),
    DEGREES,
)
"""Columns of ``Windows.figures`` beside ``first`` and ``last``; NaN where a window does not have one."""

TERMS = ("rollouts", "momentum", "second_moment", "weight_decay")
"""Figures that add up to ``total``."""


class Windows(NamedTuple):
    """The windows of a training run, in their order; nats of the entropy after the last step of each.

    Attributes:
        figures: columns, one entry a window: ``first`` and ``last`` (int64, numbers of steps), ``rollouts``, the sum of
            the influences of all its rollouts, ``momentum`` and ``second_moment``, that came in, ``weight_decay``,
            ``total``, standard errors, ``residual`` (the largest of its steps), ``absolute``, ``ess``,
            ``replay_error``, ``bytes`` on disk, ``seconds``, ``degrees_of_freedom`` (of the standard errors).
        steps: columns, one entry a window and step: ``last``, ``step``, ``rollouts``, ``stderr``, ``weight_decay``,
            ``residual``.
        labels: columns, one entry a window, kind and label: ``last``, ``kind``, ``label``, ``influence``, ``stderr``,
            ``count``, ``share``, as in ``Training.labels``.
    """

    figures: dict[str, np.ndarray]
    steps: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


class TwoAccounts(NamedTuple):
    """A term as the sum of one-step accounts and as the windows have it, in nats.

    Attributes:
        name: of the term.
        one_step: sum over the steps of the windows; NaN where single steps have no such term.
        window: sum over the windows.
        stderr: standard error of ``window``, NaN where it is not known.
    """

    name: str
    one_step: float
    window: float
    stderr: float

    @property
    def difference(self) -> float:
        """Return window minus single steps."""
        return self.window - self.one_step


def window_columns(entries: Sequence[dict[str, Any]]) -> Windows:
    """Return the windows of a ledger's entries as columns.

    Example:
        >>> account = {"first": 1, "last": 2, "figures": {"total": 0.5}, "steps": [[1, 0.5, 0.1, 0.0, 0.0]], "sums": {}}
        >>> columns = window_columns([{"step": 1}, {"step": 2, "window": account}])
        >>> columns.figures["last"].tolist(), columns.figures["total"].tolist(), columns.steps["rollouts"].tolist()
        ([2], [0.5], [0.5])
    """
    accounts = [entry[WINDOW] for entry in entries if WINDOW in entry]
    ends = {name: np.array([x[name] for x in accounts], dtype=np.int64) for name in ("first", "last")}
    figures = {name: np.array([_number(x["figures"].get(name)) for x in accounts]) for name in FIGURES}
    steps = [(x["last"], *row) for x in accounts for row in x["steps"]]
    labels = [(x["last"], kind, *row) for x in accounts for kind, rows in x["sums"].items() for row in rows]
    return Windows(
        {**ends, **figures},
        _columns(steps, {"last": np.int64, STEP: np.int64}, ("rollouts", "stderr", "weight_decay", "residual")),
        _columns(
            labels,
            {"last": np.int64, "kind": object, "label": object},
            ("influence", "stderr", "count", "share"),
        ),
    )


def covered(windows: Windows, steps: np.ndarray) -> np.ndarray:
    """Return bool (W,), whether every step of a window is measured.

    Args:
        windows: of the training run.
        steps: numbers of the measured steps.
    """
    ends = zip(windows.figures["first"], windows.figures["last"], strict=True)
    return np.array([bool(np.isin(np.arange(first, last + 1), steps).all()) for first, last in ends], dtype=bool)


def compare_accounts(windows: Windows, steps: dict[str, np.ndarray]) -> list[TwoAccounts]:
    """Return rollouts, momentum, second moment, weight decay and their total by both accounts, summed over the windows.

    Those windows are taken whose steps all are measured; none gives an empty list.

    Args:
        windows: of the training run.
        steps: columns of its measured steps, see ``Training``.
    """
    chosen = covered(windows, steps[STEP])
    if not chosen.any():
        return []
    bounds = zip(windows.figures["first"][chosen], windows.figures["last"][chosen], strict=True)
    rows = np.zeros(len(steps[STEP]), dtype=bool)
    for first, last in bounds:
        rows |= (steps[STEP] >= first) & (steps[STEP] <= last)
    accounts = []
    for name in (*TERMS, "total"):
        errors = windows.figures.get(f"{name}_stderr", np.full(len(chosen), np.nan))
        one_step = float(steps[name][rows].sum()) if name in steps else float("nan")
        window = float(windows.figures[name][chosen].sum())
        accounts.append(TwoAccounts(name, one_step, window, float(np.sqrt(np.square(errors[chosen]).sum()))))
    return accounts


def by_distance(windows: Windows) -> list[tuple[int, float, float]]:
    """Return what rollouts of the last step of a window do, of the one before, ...: (distance, sum, standard error).

    Sums are over all windows, in nats.
    """
    distance = windows.steps["last"] - windows.steps[STEP]
    return [
        (
            int(d),
            float(windows.steps["rollouts"][distance == d].sum()),
            float(np.sqrt(np.square(windows.steps["stderr"][distance == d]).sum())),
        )
        for d in sorted(set(distance.tolist()))
    ]


def _columns(rows: Sequence[tuple[Any, ...]], keys: dict[str, Any], numbers: Sequence[str]) -> dict[str, np.ndarray]:
    """Return rows of keys, of their kinds, and then numbers as columns."""
    names = (*keys, *numbers)
    by_name = dict(zip(names, zip(*rows, strict=True) if rows else ((),) * len(names), strict=True))
    known = {name: np.array(by_name[name], dtype=kind) for name, kind in keys.items()}
    return known | {name: np.array([_number(x) for x in by_name[name]], dtype=np.float64) for name in numbers}


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
