"""Forward-mode derivatives in fewer passes than torch's own rules take, and forwards made again in fewer products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fx_influence.attention import blockwise_attention, math_attention
from fx_influence.types import Params


def pushforward(
    f: Callable[[Params], Tensor], params: Params, tangent: Params, outputs: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """f(params) and its derivative along ``tangent``, by the rules of ``ForwardMode``; names absent stay put.

    What ``torch.func.jvp`` gives, and sooner: what it wraps tensors in takes a twelfth of a pass of 2,000 tokens.
    """
    with forward_ad.dual_level(), ForwardMode(outputs):
        at = {name: forward_ad.make_dual(p, tangent[name]) if name in tangent else p for name, p in params.items()}
        value, slope = forward_ad.unpack_dual(f(at))
    return value, torch.zeros_like(value) if slope is None else slope


class _AtItsLevel(TorchFunctionMode):
    """Sees what is called at the level of ``torch.func`` at which it was entered, and not what a model transforms."""

    def __enter__(self) -> _AtItsLevel:
        self._level = _level()
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.called if _level() == self._level else self.called_deeper)(func, args, kwargs or {})

    def called(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def called_deeper(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


def _level() -> int:
    top = torch._C._functorch.peek_interpreter_stack()
    return 0 if top is None else top.level()


class Tape(_AtItsLevel):
    """While active, keeps what leaves every linear map, in order.

    A forward-mode pass over the same tokens that is given the ``outputs`` has its own products to make and no others:
    a third less than without, where the weights move too. A forward made again has none to make, see ``Replay``.
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

    def called(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if func is F.linear and self._kept is not None:
            self.bytes += out.numel() * out.element_size()
            self._kept.append((out.detach(), out._version))
            if self.bytes > self.room:
                self._kept, self.bytes = None, 0
        return out


class Replay(_AtItsLevel):
    """While active, linear maps give the ``outputs`` that a ``Tape`` of the same forward kept, and derive as ever."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._outputs = iter(outputs)

    def called(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is not F.linear:
            return func(*args, **kwargs)
        known: Any = next(self._outputs, None)
        # Under autocast inside a model they differ, and casts are not replayed.
        if known is None or kwargs or not all(x is None or x.dtype == known.dtype for x in args):
            return func(*args, **kwargs)
        return _Known.apply(known, *args)


class _Known(torch.autograd.Function):
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


class ForwardMode(_AtItsLevel):
    """While active, what a model spends its time on has forward-mode derivatives of its own.

    Attention goes by ``blockwise_attention``; linear maps and products of tensors make only what they need, where torch
    multiplies by the zeros that stand for a missing tangent, as that of a frozen weight is; an embedding leaves its
    ``padding_idx`` out, see ``trained_embedding``. Where nothing moves, results are torch's own. For passes without a
    graph. ``torch.compile`` does not see these rules: compile without it. ``outputs``: of the linear maps, in order,
    from a ``Tape`` of the same forward, where there is one.
    """

    def __init__(self, outputs: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self._outputs = None if outputs is None else iter(outputs)

    def called(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is F.scaled_dot_product_attention:
            return blockwise_attention(*args, **kwargs)
        if func is F.embedding:
            return trained_embedding(*args, **kwargs)
        if func is F.linear:
            known = None if self._outputs is None else next(self._outputs, None)
            return _linear(known, *args, **kwargs)
        if func is Tensor.mul and not kwargs:
            return _product(*args)
        return func(*args, **kwargs)

    def called_deeper(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is F.embedding:
            return trained_embedding(*args, **kwargs)
        with math_attention() if func is F.scaled_dot_product_attention else nullcontext():
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


def _linear(known: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """d(x w^T + b) = dx w^T + x dw^T + db, each product added to the last as it is made."""
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
