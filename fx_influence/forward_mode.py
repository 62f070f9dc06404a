"""Forward-mode derivatives of what a model spends its time on, in fewer passes than torch's own rules take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fx_influence.attention import blockwise_attention


class Tape(TorchFunctionMode):
    """While active, keeps what leaves every linear map, in order; ``outputs`` is None once that exceeds ``room`` bytes.

    A forward-mode pass over the same tokens that is given the ``outputs`` has its own products to make and no others:
    a third less than without, where the weights move too.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.outputs: list[Tensor] | None = []
        self.bytes = 0
        self._room = room

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and self.outputs is not None:
            self.bytes += out.numel() * out.element_size()
            self.outputs.append(out.detach())
            if self.bytes > self._room:
                self.outputs, self.bytes = None, 0
        return out


class ForwardMode(TorchFunctionMode):
    """While active, attention goes by ``blockwise_attention`` and linear maps make only the products that they need.

    An embedding leaves its ``padding_idx`` out, as it does in reverse mode: see ``trained_embedding``. For passes
    without a graph: what it changes has a forward-mode derivative only. Under vmap, and for tensors without tangents,
    results are torch's own. ``torch.compile`` does not see these rules: compile without it. ``outputs``: of the linear
    maps, in order, from a ``Tape`` of the same forward, where there is one.
    """

    def __init__(self, outputs: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self._outputs = None if outputs is None else iter(outputs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return blockwise_attention(*args, **kwargs)
        if func is F.embedding:
            return trained_embedding(*args, **kwargs)
        if func is F.linear:
            known = None if self._outputs is None else next(self._outputs, None)
            # torch's own rule multiplies by the zeros that stand for a missing tangent, as that of a frozen weight is.
            if known is not None or any(_has_tangent(x) for x in args[:2]):
                return _linear(known, *args, **kwargs)
        return func(*args, **kwargs)


def trained_embedding(
    ids: Tensor, weight: Tensor, padding_idx: int | None = None, *args: object, **kwargs: Any
) -> Tensor:
    """``F.embedding`` with the derivative of reverse mode in forward mode: none at ``padding_idx``.

    torch's own forward mode moves that row with the others, although no gradient ever reaches it; the derivative of a
    loss along a direction and its gradient's product with it then differ wherever a text holds the padding token.
    """
    out = F.embedding(ids, weight, padding_idx, *args, **kwargs)  # type: ignore[arg-type]
    if padding_idx is None:
        return out
    still = (ids == padding_idx % len(weight)).unsqueeze(-1)
    return torch.where(still, out.detach(), out)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def _linear(known: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    moving = [_has_tangent(x), _has_tangent(weight), bias is not None and _has_tangent(bias)]
    if known is not None and not any(moving):
        return known
    product = _Linear.apply(x.flatten(0, -2), weight, *moving[:2], None if known is None else known.flatten(0, -2))
    out: Tensor = product.unflatten(0, x.shape[:-1])
    if bias is None or (known is not None and not moving[2]):
        return out
    # What is known holds the bias already: only its tangent is missing.
    return out + (bias if known is None else bias - bias.detach())


class _Linear(torch.autograd.Function):
    """d(x w^T) = dx w^T + x dw^T, the second product added to the first as it is made."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, x_moves: bool, weight_moves: bool, known: Tensor | None) -> Tensor:
        return x @ weight.T if known is None else known.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(*inputs[:2])
        ctx.moves = inputs[2:4]

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dw: Tensor, *_: object) -> Tensor:
        x, weight = ctx.saved_tensors
        x_moves, weight_moves = ctx.moves
        if not weight_moves:
            return dx @ weight.T
        return (x @ dw.T).addmm_(dx, weight.T) if x_moves else x @ dw.T
