"""The outputs of a forward's linear layers, kept so that a second forward of the same rows skips their products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fx_influence.policy.modes.level_aware import LevelAwareMode


class LinearOutputCache(LevelAwareMode):
    """While active, keeps what leaves every linear map, in order.

    A forward-mode pass over the same tokens that is given the ``outputs`` has its own products to make and no others:
    a third less than without, where the weights move too. A forward made again has none to make, see
    ``ReuseLinearOutputs``.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.bytes = 0
        self.room = room
        self._kept: list[tuple[Tensor, int]] | None = []

    @property
    def outputs(self) -> list[Tensor] | None:
        """None once they exceed ``room`` bytes, or where one was changed in place after it was made."""
        if self._kept is None or any(x._version != version for x, version in self._kept):
            return None
        return [x for x, _ in self._kept]

    def on_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if func is F.linear and self._kept is not None:
            self.bytes += out.numel() * out.element_size()
            self._kept.append((out.detach(), out._version))
            if self.bytes > self.room:
                self._kept, self.bytes = None, 0
        return out


class CachedOutputsMode(LevelAwareMode):
    """Knows what leaves the linear maps of a forward, in order, from a ``LinearOutputCache`` of the same forward."""

    def __init__(self, outputs: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self._outputs = None if outputs is None else list(reversed(outputs))
        self._misfit = False

    @property
    def outputs_fit(self) -> bool:
        """Whether the forward called as many linear maps as there are outputs, and each of the output's shape.

        A custom function's own are seen outside of ``torch.func`` and not inside: results are then of no use.
        """
        return not self._misfit and not self._outputs

    def _next_output(self, x: Tensor, weight: Tensor) -> Tensor | None:
        if self._outputs is None:
            return None
        known = self._outputs.pop() if self._outputs else None
        if known is None or known.shape != (*x.shape[:-1], *weight.shape[:-1]):
            self._misfit = True
            return None
        return known


class ReuseLinearOutputs(CachedOutputsMode):
    """Replace linear layers' products by the ``outputs`` of a ``LinearOutputCache``, with the usual derivatives."""

    def on_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is not F.linear:
            return func(*args, **kwargs)
        given = linear_arguments(*args, **kwargs)
        known = self._next_output(*given[:2])
        # Under autocast inside a model they differ, and casts are not replayed.
        if known is None or given[1].dim() != 2 or not all(x is None or x.dtype == known.dtype for x in given):
            return func(*args, **kwargs)
        return _KnownLinear.apply(known, *given)


def linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments of ``F.linear`` in order, however they are passed."""
    return input, weight, bias


class _KnownLinear(torch.autograd.Function):
    """x w^T + b where it is known already."""

    @staticmethod
    def forward(ctx: Any, known: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return known.detach()

    @staticmethod
    def backward(ctx: Any, toward: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        _, of_x, of_weight, *of_bias = ctx.needs_input_grad
        flat = toward.reshape(-1, toward.shape[-1])
        return (
            None,
            (flat @ weight).reshape(x.shape) if of_x else None,
            flat.T @ x.reshape(-1, x.shape[-1]) if of_weight else None,
            *(flat.sum(0) if wanted else None for wanted in of_bias),
        )
