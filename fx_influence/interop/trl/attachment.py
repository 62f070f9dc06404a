"""Find the trainer that a callback belongs to and a free name among its callbacks; warn without ending its run."""

from __future__ import annotations

import itertools
import logging
import sys
import warnings
from collections.abc import Collection
from typing import Any

from transformers import Trainer, TrainerCallback

from fx_influence.distributed.collectives import RankError
from fx_influence.interop.trl.capture.micro_batch import CaptureError
from fx_influence.types import IdentityError

logger = logging.getLogger(__name__)


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


def warn(text: str) -> None:
    """Warn without ending a training run: where warnings are errors, log instead."""
    try:
        warnings.warn(text, stacklevel=3)
    except Exception:
        logger.warning(text)


def reason(error: Exception) -> str:
    """Return an error's text, preceded by its class unless errors of the class explain themselves."""
    explained = isinstance(error, (ValueError, TypeError, CaptureError, RankError, IdentityError)) and str(error)
    return str(error) if explained else f"{type(error).__name__}: {error}"
