"""The outputs of a forward's linear layers, kept so that a second forward of the same rows skips their products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
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


class _WithOutputs(LevelAwareMode):
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


class ReuseLinearOutputs(_WithOutputs):
    """Replace linear layers' products by the ``outputs`` of a ``LinearOutputCache``, with the usual derivatives."""

    def on_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is not F.linear:
            return func(*args, **kwargs)
        given = _linear_arguments(*args, **kwargs)
        known = self._next_output(*given[:2])
        # Under autocast inside a model they differ, and casts are not replayed.
        if known is None or given[1].dim() != 2 or not all(x is None or x.dtype == known.dtype for x in given):
            return func(*args, **kwargs)
        return _KnownLinear.apply(known, *given)


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
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


def _linear(known: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """d(x w^T + b) = dx w^T + x dw^T + db, each product added to the last as it is made."""
    if weight.dim() != 2:
        return F.linear(x, weight, bias)
    (x, dx), (weight, dw) = forward_ad.unpack_dual(x), forward_ad.unpack_dual(weight)
    bias, db = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    out = F.linear(x, weight, bias) if known is None else known
    if dw is not None:
        toward = x.reshape(-1, x.shape[-1]) @ dw.T
        if dx is not None:
            flat = dx.reshape(-1, x.shape[-1])
            # Under autocast alone they differ, and what is done in place is not cast.
            alike = toward.dtype == flat.dtype == weight.dtype
            toward = toward.addmm_(flat, weight.T) if alike else toward + flat @ weight.T
    elif dx is not None:
        toward = dx.reshape(-1, x.shape[-1]) @ weight.T
    else:
        return out if db is None else forward_ad.make_dual(out, db.expand_as(out).clone())
    toward = toward.reshape(out.shape)
    return forward_ad.make_dual(out, toward if db is None else toward.add_(db))


def _product(x: Any, y: Any) -> Tensor:
    (x, dx), (y, dy) = (forward_ad.unpack_dual(a) if isinstance(a, Tensor) else (a, None) for a in (x, y))
    out: Tensor = x * y
    if dx is None and dy is None:
        return out
    if dx is None or dy is None:
        return forward_ad.make_dual(out, x * dy if dx is None else dx * y)
    return forward_ad.make_dual(out, (dx * y).addcmul_(x, dy))
