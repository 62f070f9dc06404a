"""Store the outputs of a forward's linear layers, so that a second forward of the same rows skips their products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fx_influence.policy.modes.level_aware import LevelAwareMode


class LinearOutputCache(LevelAwareMode):
    """Store, while active, the output of every linear layer, in order of the calls.

    A forward-mode pass over the same tokens that is given the ``outputs`` computes only the products of its tangents, a
    third fewer than without them where the weights move too. A recomputed forward computes none, see
    ``ReuseLinearOutputs``.

    Args:
        max_bytes: size of all outputs at which they are dropped.
    """

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self.bytes = 0
        self.max_bytes = max_bytes
        self._stored: list[tuple[Tensor, int]] | None = []

    @property
    def outputs(self) -> list[Tensor] | None:
        """The outputs in order; None once they exceed ``max_bytes``, or if one was changed in place afterwards."""
        if self._stored is None or any(x._version != version for x, version in self._stored):
            return None
        return [x for x, _ in self._stored]

    def on_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if func is F.linear and self._stored is not None:
            self.bytes += out.numel() * out.element_size()
            self._stored.append((out.detach(), out._version))
            if self.bytes > self.max_bytes:
                self._stored, self.bytes = None, 0
        return out


class CachedOutputsMode(LevelAwareMode):
    """A mode that is given the outputs of a forward's linear layers, from a ``LinearOutputCache`` of the same forward.

    Args:
        outputs: in order of the calls; None where there is no cache.
    """

    def __init__(self, outputs: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self._outputs = None if outputs is None else list(reversed(outputs))
        self._misfit = False

    @property
    def outputs_fit(self) -> bool:
        """Return whether the forward called as many linear layers as there are outputs, each of the output's shape.

        A mode sees the linear layers of a custom ``autograd.Function`` outside ``torch.func`` and not inside it. If the
        outputs do not fit, the results of the forward are wrong and must be dropped.
        """
        return not self._misfit and not self._outputs

    def next_output(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """Return the stored output of the next linear layer, or None where there is none of its shape."""
        if self._outputs is None:
            return None
        output = self._outputs.pop() if self._outputs else None
        if output is None or output.shape != (*x.shape[:-1], *weight.shape[:-1]):
            self._misfit = True
            return None
        return output


class ReuseLinearOutputs(CachedOutputsMode):
    """Replace linear layers' products by the ``outputs`` of a ``LinearOutputCache``, with the usual derivatives."""

    def on_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is not F.linear:
            return func(*args, **kwargs)
        x, weight, bias = linear_arguments(*args, **kwargs)
        output = self.next_output(x, weight)
        # Under autocast inside a model the dtypes differ, and the casts are not repeated here.
        same_dtype = output is not None and all(y is None or y.dtype == output.dtype for y in (x, weight, bias))
        if output is None or weight.dim() != 2 or not same_dtype:
            return func(*args, **kwargs)
        return _StoredLinear.apply(output, x, weight, bias)


def linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the arguments of ``F.linear`` in order, however they are passed.

    Args:
        input: x, (..., in).
        weight: w, (out, in).
        bias: b, (out,), or None.
    """
    return input, weight, bias


class _StoredLinear(torch.autograd.Function):
    """x w^T + b, whose value is stored already."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        _, needs_x, needs_weight, *needs_bias = ctx.needs_input_grad
        flat = cotangent.reshape(-1, cotangent.shape[-1])
        return (
            None,
            (flat @ weight).reshape(x.shape) if needs_x else None,
            flat.T @ x.reshape(-1, x.shape[-1]) if needs_weight else None,
            *(flat.sum(0) if needed else None for needed in needs_bias),
        )
