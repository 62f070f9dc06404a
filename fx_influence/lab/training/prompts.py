"""Follow prompts that return over a training run: what their rollouts did to the entropy each time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fx_influence.interop.ledger.file import STEP
from fx_influence.lab.training.account import Series, Term, degrees_of_freedom
from fx_influence.lab.training.load import Training


class PromptSeries(NamedTuple):
    """A prompt in the measured steps that have it.

    Attributes:
        key: that tells the prompt from others, the same in every step.
        prompt: beginning of its text.
        term: sum over its appearances, nats, with its standard error.
        steps: (K,), numbers of the steps in which it appears, ascending.
        influence: (K,), the sum of its rollouts' influences each time, nats.
        stderr: (K,), their standard errors, NaN where they are not known.
        reward: (K,), mean rewards of its rollouts, NaN where they have none.
    """

    key: str
    prompt: str
    term: Term
    steps: np.ndarray
    influence: np.ndarray
    stderr: np.ndarray
    reward: np.ndarray


def returning_prompts(training: Training) -> list[PromptSeries]:
    """Return the prompts that appear in two measured steps at least, the one with the largest sum in size first.

    E is drawn independently in every step, so the error of a sum is the root of the sum of squares. The ledger has the
    64 prompts of a step with the largest shares of the sum of |influence|; an appearance in which a prompt was not
    among them is missing.

    Args:
        training: from ``load_training``.
    """
    columns = training.prompts
    if not columns or not len(columns["key"]):
        return []
    keys, first, place, counts = np.unique(
        columns["key"].astype(str), return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(place, kind="stable")
    rows_of = np.split(order, np.cumsum(counts)[:-1])
    series = [
        _series(training, str(keys[k]), str(columns["prompt"][first[k]]), rows_of[k])
        for k in np.flatnonzero(counts > 1).tolist()
    ]
    return sorted(series, key=lambda x: (-abs(x.term.value), x.key))


def _series(training: Training, key: str, prompt: str, rows: np.ndarray) -> PromptSeries:
    columns = training.prompts
    influence, stderr, steps = (columns[name][rows] for name in ("influence", "stderr", STEP))
    degrees = degrees_of_freedom(training)[np.searchsorted(training.steps[STEP], steps)]
    term = Series(influence, stderr).summed(key, degrees)
    return PromptSeries(key, prompt, term, steps, influence, stderr, columns["reward"][rows])
