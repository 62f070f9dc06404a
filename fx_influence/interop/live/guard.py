"""Measure without ending or changing a training run: errors that become warnings, and the random state."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from fx_influence.distributed.collectives import RankError, propagate_failures
from fx_influence.types import IdentityError

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


class CaptureError(RuntimeError):
    """Raised for a step whose loss depends on more than the log-probabilities and entropies of its own rollouts."""


class GenerationError(ValueError):
    """Raised for completions that are not sampled from the policy."""


class Failure(NamedTuple):
    """A step that could not be attributed.

    Attributes:
        text: the reason.
        ends_measuring: whether later steps would fail alike, because completions are not sampled from the policy.
    """

    text: str
    ends_measuring: bool

    def sentence(self, step: int) -> str:
        """Return the warning for the step of this number."""
        later = " and those after it are" if self.ends_measuring else " is"
        return f"step {step}{later} not attributed: {self.text}"


def attempt(work: Callable[[], Value], device: torch.device, mesh: DeviceMesh | None) -> Value | Failure:
    """Return the result of ``work``, or why it failed on this or another process; ``KeyboardInterrupt`` passes.

    The training run's random state is restored in both cases, and its grad mode and autocast have no effect.

    Args:
        work: the measurement.
        device: of the training run.
        mesh: of its processes, None for a single process.
    """
    try:
        with propagate_failures(mesh), preserve_random_state(device), _plain_mode(device):
            return work()
    except Exception as error:
        failure = Failure(reason(error), isinstance(error, GenerationError))
        out_of_memory = isinstance(error, torch.cuda.OutOfMemoryError)
    # Outside of the except clause, where the error's frames no longer refer to tensors.
    if out_of_memory:
        torch.cuda.empty_cache()
    return failure


@contextmanager
def _plain_mode(device: torch.device) -> Iterator[None]:
    """Enable gradients and disable autocast on ``device``."""
    with torch.enable_grad():
        if not torch.amp.autocast_mode.is_autocast_available(device.type):
            yield
            return
        with torch.autocast(device.type, enabled=False):
            yield


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
