"""Forward-mode derivatives of what a model spends its time on, in fewer passes than torch's own rules take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fx_influence.attention import blockwise_attention


class ForwardMode(TorchFunctionMode):
    """While active, attention goes by ``blockwise_attention`` and linear maps add up their tangents in place.

    For passes without a graph: what it changes has a forward-mode derivative only. Under vmap, and for tensors without
    tangents, results are torch's own. ``torch.compile`` does not see these rules: compile without it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return blockwise_attention(*args, **kwargs)
        if func is F.linear and all(_has_tangent(x) for x in args[:2]):
            return _linear(*args, **kwargs)
        return func(*args, **kwargs)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = _Linear.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


class _Linear(torch.autograd.Function):
    """d(x w^T) = dx w^T + x dw^T, the second product added to the first as it is made."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dw: Tensor) -> Tensor:
        x, weight = ctx.saved_tensors
        return (x @ dw.T).addmm_(dx, weight.T)
