"""The environment of a run and its cost in seconds and bytes, stored beside its numbers."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("fx-influence", "torch", "transformers", "numpy", "scipy", "peft", "trl", "math-verify", "safetensors")

SMALL_MODEL = 10_000_000
"""Number of parameters below which one thread is fastest."""


def environment() -> dict[str, Any]:
    """Return versions, processor and threads: everything by which a repeat on another machine may differ."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process plus, with a GPU, the peak of tensors on it."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return resident + (peak_gpu_memory_bytes() or 0)


def peak_gpu_memory_bytes() -> int | None:
    """Return the peak of the tensors on the GPU in this process; None without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the seconds spent inside to ``seconds[phase]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


@contextmanager
def limit_threads(parameters: int) -> Iterator[None]:
    """Use one torch thread for a small model, and restore the number of threads afterwards.

    For operations of microseconds a second thread saves nothing, and on a busy machine waiting for it costs twenty
    times the work itself.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if parameters < SMALL_MODEL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _version(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
