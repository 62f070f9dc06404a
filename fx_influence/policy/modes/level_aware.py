"""A function mode that tells calls at its own level of torch.func from calls inside deeper transformations."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

Mode = TypeVar("Mode", bound="LevelAwareMode")


class LevelAwareMode(TorchFunctionMode):
    """Pass calls at the ``torch.func`` level where it was entered to ``on_call``, deeper ones to ``on_nested_call``.

    A model may transform functions itself, by a ``vmap`` or ``jvp`` of its own. Inside those, tensors are wrapped once
    more, and the rules of a mode for plain tensors would not hold.
    """

    def __enter__(self: Mode) -> Mode:
        self._level = _level()
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.on_call if _level() == self._level else self.on_nested_call)(func, args, kwargs or {})

    def on_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of a call at the mode's own level."""
        return func(*args, **kwargs)

    def on_nested_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of a call inside a transformation that the model itself makes."""
        return func(*args, **kwargs)


def _level() -> int:
    top = torch._C._functorch.peek_interpreter_stack()
    return 0 if top is None else top.level()
