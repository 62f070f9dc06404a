"""A function mode that tells calls at its own level of torch.func from calls inside deeper transformations."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

Mode = TypeVar("Mode", bound="LevelAwareMode")


class LevelAwareMode(TorchFunctionMode):
    """Sees what is called at the level of ``torch.func`` at which it was entered, and not what a model transforms."""

    def __enter__(self: Mode) -> Mode:
        self._level = _level()
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.on_call if _level() == self._level else self.on_nested_call)(func, args, kwargs or {})

    def on_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def on_nested_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


def _level() -> int:
    top = torch._C._functorch.peek_interpreter_stack()
    return 0 if top is None else top.level()
