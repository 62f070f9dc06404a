"""Find the trainer that a callback belongs to, and a free name among its callbacks."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection
from typing import Any

from transformers import Trainer, TrainerCallback


def calling_trainer(callback: TrainerCallback) -> Any:
    """Return the trainer that is calling an event of this callback, None outside of events.

    No event passes its trainer, nor anything that refers to it; the trainer is looked for in the frames of the call.
    """
    frame = sys._getframe(1)
    while frame is not None:
        for value in list(frame.f_locals.values()):
            if issubclass(type(value), Trainer) and any(x is callback for x in value.callback_handler.callbacks):
                return value
        frame = frame.f_back  # type: ignore[assignment]
    return None


def free_name(requested: str | None, taken: Collection[str]) -> str:
    """Return the requested name, or the first free one of "", "2", "3", ... where none is requested.

    Raises ``ValueError`` for a requested name that is taken.

    Example:
        >>> free_name(None, {""})
        '2'
    """
    if requested is None:
        return next(name for name in itertools.chain([""], map(str, itertools.count(2))) if name not in taken)
    if requested in taken:
        raise ValueError(
            f"name is {requested!r}, as of another EntropyInfluence of this trainer; expected a name of its own. "
            "Give one, or detach the other"
        )
    return requested
