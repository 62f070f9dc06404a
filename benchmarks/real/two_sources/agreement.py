"""Compare the ledgers of one training run by two independent E: sum by sum, and label by label over the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fx_influence.estimators.stderr import degrees_of_sum, interval_half_width
from fx_influence.lab.training.load import Training


class Pair(NamedTuple):
    """The sum of a label's influences in one step, by the first E and by the second, in nats, with standard errors."""

    step: int
    kind: str
    label: str
    first: float
    first_stderr: float
    second: float
    second_stderr: float


def pairs(first: Training, second: Training) -> list[Pair]:
    """Return the sums that both ledgers have, but for those that are 0 because their rollouts have no advantage."""
    sums = {key: (value, stderr) for key, value, stderr in _rows(second)}
    return [
        Pair(*key, value, stderr, *sums[key])
        for key, value, stderr in _rows(first)
        if key in sums and (value or sums[key][0])
    ]


def _rows(training: Training) -> list[tuple[tuple[int, str, str], float, float]]:
    names = ("step", "kind", "label", "influence", "stderr")
    rows = zip(*(training.labels[name].tolist() for name in names), strict=True)
    return [((step, kind, label), value, stderr) for step, kind, label, value, stderr in rows]


def agreement(compared: Sequence[Pair], degrees_of_freedom: Sequence[float]) -> dict[str, Any]:
    """Return how far two ledgers agree on single sums.

    Args:
        compared: the sums by both.
        degrees_of_freedom: of the standard errors of the first ledger and of the second.

    Returns:
        ``count``; ``correlation``; ``slope`` of the second on the first and ``slope_back`` of the first on the second,
        through zero, both of which errors draw towards 0; ``with_error``, the number of sums that have error bars, and
        ``inside``, the share of these whose difference is inside the 95% interval of both errors. None where there are
        too few sums.
    """
    x, y = (np.array([getattr(pair, name) for pair in compared], dtype=np.float64) for name in ("first", "second"))
    errors = np.array([[pair.first_stderr, pair.second_stderr] for pair in compared], dtype=np.float64)
    known = np.isfinite(errors).all(-1)
    degrees = np.array([degrees_of_sum(both, np.asarray(degrees_of_freedom)) for both in errors])
    half_width = interval_half_width(np.hypot(*errors.T), degrees)
    several = len(x) > 2 and x.std() > 0 and y.std() > 0
    return {
        "count": len(x),
        "correlation": float(np.corrcoef(x, y)[0, 1]) if several else None,
        "slope": float(x @ y / (x @ x)) if several else None,
        "slope_back": float(x @ y / (y @ y)) if several else None,
        "with_error": int(known.sum()),
        "inside": float((np.abs(x - y) <= half_width)[known].mean()) if known.any() else None,
    }


def with_self_influence(training: Training) -> float:
    """Return the correlation over steps of what is measured beyond the prediction with the rollouts' self-influence.

    Neither has the rollouts' effect on their own prompts, so there should be none.
    """
    steps = training.steps
    return float(np.corrcoef(steps["measured"] - steps["total"], steps["self_influence"])[0, 1])


def label_totals(compared: Sequence[Pair], kind: str) -> list[dict[str, Any]]:
    """Return each label's sums over the compared steps by both E, with the roots of the sums of squared errors."""
    chosen = [pair for pair in compared if pair.kind == kind]
    return [
        {
            "label": label,
            "steps": len(rows),
            "first": sum(pair.first for pair in rows),
            "first_stderr": float(np.sqrt(sum(pair.first_stderr**2 for pair in rows))),
            "second": sum(pair.second for pair in rows),
            "second_stderr": float(np.sqrt(sum(pair.second_stderr**2 for pair in rows))),
        }
        for label in dict.fromkeys(pair.label for pair in chosen)
        for rows in [[pair for pair in chosen if pair.label == label]]
    ]
