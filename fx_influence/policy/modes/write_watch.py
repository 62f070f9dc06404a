"""A dispatch mode that keeps a forward from writing to live tensors, and records which it would have written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fx_influence.core.dtensor import to_local
from fx_influence.types import Params


class WriteWatch(TorchDispatchMode):
    """Skip, while active, every operation that writes to one of ``tensors``, and record it.

    If something was recorded, the results of the forward are worthless.

    Args:
        tensors: by name.
        ids: the tokens that the forward is given.

    Attributes:
        written: name of a tensor -> the first operation that would have written to it.
        vocabulary: rows of the smallest table in which ``ids`` were looked up, None if they were not.
    """

    def __init__(self, tensors: Params, ids: Tensor) -> None:
        super().__init__()
        self.written: dict[str, str] = {}
        self.vocabulary: int | None = None
        self._ids = ids
        self._names: dict[int, dict[int, str]] = {}
        for name, x in tensors.items():
            local = to_local(x)
            if local.numel() and not local.is_meta:
                offsets = self._names.setdefault(local.untyped_storage().data_ptr(), {})
                offsets[int(local.storage_offset())] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.embedding.default and torch.equal(args[1], self._ids):
            self.vocabulary = min(len(args[0]), self.vocabulary or len(args[0]))
        if func._schema.is_mutable and not _binds_itself(func, args):
            for k, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                value = args[k] if k < len(args) else kwargs.get(argument.name)
                for x in value if isinstance(value, (list, tuple)) else [value]:
                    name = self._name(x) if isinstance(x, Tensor) else None
                    if name is not None:
                        self.written.setdefault(name, str(func.overloadpacket))
                        return value if func._schema.returns else None
        return func(*args, **kwargs)

    def _name(self, x: Tensor) -> str | None:
        try:
            offsets = self._names.get(x.untyped_storage().data_ptr())
        except (RuntimeError, NotImplementedError):
            # A wrapper without a storage is none of the tensors.
            return None
        if offsets is None:
            return None
        return offsets.get(int(x.storage_offset()), next(iter(offsets.values())))


def _binds_itself(func: Any, args: Any) -> bool:
    """Return whether a tensor is given the storage that it has, as in parametrizations that PEFT makes in a forward."""
    if func is not torch.ops.aten.set_.source_Tensor:
        return False
    x, source = args
    same_storage = x.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    return (
        same_storage
        and x.shape == source.shape
        and x.stride() == source.stride()
        and x.storage_offset() == source.storage_offset()
    )
