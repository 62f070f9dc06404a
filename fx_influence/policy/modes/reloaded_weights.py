"""Keep weights out of an autograd graph: backward makes each again when it needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Placeholder(NamedTuple):
    """Placeholder saved for backward instead of (a view of) a weight."""

    name: str
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def reload_on_backward(
    weights: Mapping[str, Tensor], reload: Callable[[str], Tensor], on_save: Callable[[], object] = lambda: None
) -> saved_tensors_hooks:
    """Return hooks under which a graph saves none of the weights, nor a view of one; backward reloads them.

    Args:
        weights: full weights by name.
        reload: called with a weight's name; returns the same values in the same layout.
        on_save: called where the graph would have saved a weight.

    Example:
        >>> x, w = torch.ones(2, requires_grad=True), torch.tensor([3.0, 4.0])
        >>> with reload_on_backward({"w": w}, lambda name: torch.tensor([3.0, 4.0])):
        ...     loss = (x * w).sum()
        >>> loss.backward()
        >>> x.grad
        tensor([3., 4.])
    """
    names = {w.untyped_storage().data_ptr(): name for name, w in weights.items() if w.numel()}
    # Saved-tensor hooks do not nest, and the caller may have hooks that watch what the graph saves.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    outer_pack, outer_unpack = outer or (lambda x: x, lambda x: x)

    def pack(x: Tensor) -> Any:
        name = names.get(x.untyped_storage().data_ptr())
        if name is None:
            return outer_pack(x)
        on_save()
        return _Placeholder(name, x.dtype, x.size(), x.stride(), int(x.storage_offset()))

    def unpack(saved: Any) -> Tensor:
        if not isinstance(saved, _Placeholder):
            return outer_unpack(saved)
        weight = reload(saved.name)
        return weight.view(saved.dtype).as_strided(saved.size, saved.stride, saved.offset)

    return saved_tensors_hooks(pack, unpack)
