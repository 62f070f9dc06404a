"""Run models in float64 that cast to float32 in places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NAMES = {"torch.FloatTensor", "torch.cuda.FloatTensor"}


class StayFloat64(TorchFunctionMode):
    """While active, a model's requests for float32 give float64: in norms, routers, scores and attention's softmax.

    Those casts protect half precision. In float64 they would round every forward to float32, and worse: eager attention
    masks with the dtype's lowest number, and in a float32 softmax float64's lowest is -inf, so a query that sees
    nothing, as padding on the left does, would be NaN, and through it every gradient. A request for float32, by method,
    by argument or by default in a new tensor, becomes one for float64. Float32 tensors that the model stores are cast
    where they meet float64 in a product.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        like_another = func in (Tensor.to, Tensor.type_as) and isinstance(args[-1], Tensor) and len(args) > 1
        if func is Tensor.float or (like_another and args[-1].dtype == torch.float32):
            return args[0].double()
        if any(_asks_float32(x) for x in args):
            args = tuple(torch.float64 if _asks_float32(x) else x for x in args)
        if _asks_float32(kwargs.get("dtype")):
            kwargs = {**kwargs, "dtype": torch.float64}
        tensors = [x for x in args if isinstance(x, Tensor)]
        if {x.dtype for x in tensors} >= {torch.float32, torch.float64} and not _writes(func):
            # Rotary embeddings of transformers 4 are such products: frequencies, stored in float32, times positions.
            args = tuple(x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in args)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and not tensors and out.dtype == torch.float32 and not _is_attribute(func):
            return out.double()
        return out


def _asks_float32(x: Any) -> bool:
    return x is torch.float32 or (isinstance(x, str) and x in _NAMES)


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _is_attribute(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__"
