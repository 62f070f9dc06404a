"""Define what a check of a run reads, and what it returns."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from fx_influence.estimators.stderr import Errors, interval_half_width

Level = Literal["good", "attention", "unknown"]


class Finding(NamedTuple):
    """Result of one check of a run.

    Attributes:
        name: of the check.
        level: "good", "attention" where something is to be done, "unknown" where the figures do not decide it.
        text: the result in a sentence or two, with the remedy.
    """

    name: str
    level: Level
    text: str


class Figures(NamedTuple):
    """Figures of a run that the checks read.

    Attributes:
        run_summary: ``summary.json``.
        summary: figures of one E.
        arrays: of ``eval_00.npz`` of that E.
        lr: learning rate of the step.
        bound: largest residual of the identity, over the sum of |influence|.
        advantages: of every rollout of U, None where it has none; empty where no rollouts were stored.
        degrees_of_freedom: of Student's t for intervals about influences and their sums.
    """

    run_summary: dict[str, Any]
    summary: dict[str, Any]
    arrays: dict[str, np.ndarray]
    lr: float
    bound: float
    advantages: list[float | None]
    degrees_of_freedom: float

    def half_width(self, stderr: Errors) -> Errors:
        """Return the half-widths of 95% intervals about influences and their sums of these standard errors."""
        return interval_half_width(stderr, self.degrees_of_freedom)


def value_at_lr(arrays: dict[str, np.ndarray], name: str, lr: float) -> float | None:
    """Return an array over eta at the learning rate; None where no such step was made.

    Args:
        arrays: of an evaluation, with ``eta``.
        name: of the array.
        lr: learning rate.
    """
    if name not in arrays:
        return None
    [index] = np.nonzero(np.isclose(arrays["eta"], lr, rtol=1e-6, atol=0.0))
    return float(arrays[name][index[0]]) if len(index) else None
