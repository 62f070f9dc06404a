"""Notice or undo the places where a model's own code cuts off derivatives, by ``detach`` or ``no_grad``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# In torch a property's getter is a function, which a mode sees.
_DATA: Any = vars(torch.Tensor.__mro__[1])["data"].__get__
_DETACH = (Tensor.detach, torch.detach, Tensor.detach_)
_SET_GRAD: Any = torch._C._set_grad_enabled


class DetachmentWatch(TorchFunctionMode):
    """Record in ``seen``, while active, whether a tensor that requires a gradient is detached or used under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False
        self._grad_disabled = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _SET_GRAD:
            self._grad_disabled = not args[0]
        elif (func in _DETACH or _is_data(func) or (self._grad_disabled and not _is_getter(func))) and not self.seen:
            self.seen = any(isinstance(x, Tensor) and x.requires_grad for x in args)
        return func(*args, **(kwargs or {}))


class Undetached(TorchFunctionMode):
    """While active, ``detach`` and ``.data`` return the tensor itself and ``no_grad`` does nothing.

    A model's derivatives are then those of the function that it computes, whatever its training leaves out of them:
    PEFT's DoRA detaches the norms of its weights, a straight-through estimator what it rounds.
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
