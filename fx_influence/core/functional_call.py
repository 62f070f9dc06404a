"""Call a module on tensors by name, with torch's own linear map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fx_influence.types import Params


def functional_call(module: nn.Module, known: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a module's forward returns for ``args`` and ``kwargs`` with the tensors ``known``, by path.

    DeepSpeed's ZeRO-3 replaces ``F.linear`` for the rest of the process by a function without forward mode, which
    no module inside the call sees.

    Example:
        >>> functional_call(nn.Linear(1, 1), {"weight": torch.ones(1, 1), "bias": torch.ones(1)}, (torch.ones(1),), {})
        tensor([2.])
    """
    # Compared first, because torch.compile follows this comparison and not what a built-in function's module is.
    if F.linear is not torch._C._nn.linear and _is_of_deepspeed(F.linear):
        with _torch_linear():
            return _call(module, known, args, kwargs)
    return _call(module, known, args, kwargs)


def _call(module: nn.Module, known: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Every slot gets its tensor here, because torch ties modules of two names wrongly (pytorch#164759).
    return torch.func.functional_call(module, known, args, kwargs, tie_weights=False)


def _is_of_deepspeed(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("deepspeed.")


@contextmanager
def _torch_linear() -> Iterator[None]:
    replacement, vars(F)["linear"] = F.linear, torch._C._nn.linear
    try:
        yield
    finally:
        vars(F)["linear"] = replacement
