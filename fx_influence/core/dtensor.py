"""Tensors of which every rank holds a part: what is one number of a whole tensor is reduced over its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """Whether it is a DTensor; told without importing them, which older torch does not have."""
    return hasattr(x, "placements")


def to_local(x: Tensor) -> Tensor:
    """What this rank holds of a DTensor; any other tensor itself."""
    part: Any = x
    return part.to_local() if is_sharded(x) else x


def reduce_over_shards(values: Sequence[Tensor], of: Sequence[Tensor], *, largest: bool = False) -> list[Tensor]:
    """Scalars of one dtype, one of each tensor's own part: their sum over the parts of that tensor, or the largest.

    One all-reduce for all tensors of a mesh, over its sharded axes; ranks that hold the same part count once. The value
    of a tensor that is not sharded stays. Raises ``ValueError`` for a DTensor that is still to be summed over ranks.

    Example:
        >>> reduce_over_shards([torch.tensor(3.0)], [torch.ones(3)])
        [tensor(3.)]
    """
    out = list(values)
    places: dict[tuple[Any, int], list[int]] = {}
    for k, x in enumerate(of):
        for mesh, axis in _sharded_axes(x):
            places.setdefault((mesh, axis), []).append(k)
    for (mesh, axis), some in places.items():
        together = torch.stack([out[k] for k in some])
        reduce = torch.distributed.ReduceOp
        torch.distributed.all_reduce(together, reduce.MAX if largest else reduce.SUM, mesh.get_group(axis))
        for k, value in zip(some, together.unbind(), strict=True):
            out[k] = value
    return out


def _sharded_axes(x: Any) -> list[tuple[Any, int]]:
    if not is_sharded(x):
        return []
    if any(placement.is_partial() for placement in x.placements):
        raise ValueError(f"a tensor of shape {tuple(x.shape)} is {x.placements}; sum it over the ranks first")
    return [(x.device_mesh, axis) for axis, placement in enumerate(x.placements) if placement.is_shard()]
