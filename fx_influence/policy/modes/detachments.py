"""Derivatives that a model's own code cuts off, by ``detach`` or ``no_grad``: seen, and undone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# In torch a property's getter is a function of its own.
_DATA: Any = vars(torch._C.TensorBase)["data"].__get__
_DETACH = (Tensor.detach, torch.detach, Tensor.detach_)
_SET_GRAD: Any = torch._C._set_grad_enabled


class DetachmentWatch(TorchFunctionMode):
    """While active, notes whether a tensor that requires a gradient is detached, or used without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False
        self._off = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _SET_GRAD:
            self._off = not args[0]
        elif (func in _DETACH or _is_data(func) or (self._off and not _is_getter(func))) and not self.seen:
            self.seen = any(isinstance(x, Tensor) and x.requires_grad for x in args)
        return func(*args, **(kwargs or {}))


class Undetached(TorchFunctionMode):
    """While active, ``detach`` and ``.data`` give the tensor itself and ``no_grad`` does nothing.

    So the derivatives of a model are those of the function that it is, whatever its training leaves out of them: PEFT's
    DoRA its norms of weights, a straight-through estimator what it passes by.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DETACH or _is_data(func):
            return args[0] if args else (kwargs or {})["input"]
        if func is _SET_GRAD:
            return None
        return func(*args, **(kwargs or {}))


def _is_getter(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__"


def _is_data(func: Any) -> bool:
    return bool(func == _DATA)
