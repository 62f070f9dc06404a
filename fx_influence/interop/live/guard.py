"""Measure without ending or changing a training run: warnings, reasons of failures, and the random state."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fx_influence.distributed.collectives import RankError
from fx_influence.interop.live.errors import CaptureError
from fx_influence.types import IdentityError

logger = logging.getLogger(__name__)


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """Restore afterwards every random state that a training run on ``device`` draws from."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


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
