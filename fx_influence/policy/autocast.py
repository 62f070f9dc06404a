"""A trainer's mixed precision: autocast around a policy's forwards, and the loss scale of float16."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALF_DTYPES = (torch.bfloat16, torch.float16)


class Autocast(NamedTuple):
    """Precision of a trainer's passes: ``dtype`` of its autocast, ``loss_scale`` that gradients are multiplied by."""

    dtype: torch.dtype
    loss_scale: float = 1.0

    def wrap(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``f`` under this autocast, on the device of the first tensor among its arguments."""

        @functools.wraps(f)
        def wrapped(*args: Any) -> Any:
            with torch.autocast(_device_type(args), self.dtype):
                return f(*args)

        return wrapped


def _device_type(args: tuple[Any, ...]) -> str:
    for x in args:
        values = x.values() if isinstance(x, dict) else [x]
        for value in values:
            if isinstance(value, Tensor):
                return value.device.type
    raise TypeError(f"args hold no tensor among {len(args)}; expected one, whose device autocast needs. Pass one")


def active_autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype of the autocast that is active for a type of device, or None."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # torch before 2.4
    if device == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
