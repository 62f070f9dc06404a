"""Hooks around an optimizer's step, torch's or DeepSpeed's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fx_influence.interop.runtime.method_wrapper import MethodWrapper
from fx_influence.interop.zero.partitions import is_zero_optimizer

StepHook = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
"""Called with the optimizer, the positional arguments of its ``step``, itself first, and the others."""


def hook_step(optimizer: Any, before: StepHook, after: StepHook) -> list[Callable[[], None]]:
    """Call hooks around every step of an optimizer; return what removes them.

    DeepSpeed steps the torch optimizer inside its own once for every group of parameters, each with its gradient made
    just before, so that its own step is hooked.

    Args:
        optimizer: of torch, or DeepSpeed's of ZeRO.
        before: called before the step.
        after: called after it.
    """
    if not is_zero_optimizer(optimizer):
        handles = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
        return [handle.remove for handle in handles]

    def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before(optimizer, (optimizer, *args), kwargs)
        result = original(*args, **kwargs)
        after(optimizer, (optimizer, *args), kwargs)
        return result

    return [MethodWrapper(optimizer, "step", step).undo]
