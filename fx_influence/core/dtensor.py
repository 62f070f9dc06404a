"""DTensors, of which every rank holds one shard: reductions to a number of the full tensor, and failures of a rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

announcement: ContextVar[Callable[[], None] | None] = ContextVar("announcement", default=None)
"""Function that tells the other ranks that this one has not failed; None where nobody asks."""


def before_collective() -> None:
    """Tell the other ranks that this one has not failed, and raise what one of them has failed with, if they ask.

    It is called right before every collective, once the memory for that is allocated: a rank that fails elsewhere then
    takes part in this exchange instead, and no other waits for it in a collective.
    """
    announce = announcement.get()
    if announce is not None:
        announce()


def is_sharded(x: Tensor) -> bool:
    """Return whether ``x`` is a DTensor, without importing that class, which older torch does not have."""
    return hasattr(x, "placements")


def full_shape(p: Tensor) -> torch.Size:
    """Return the shape that a model's forward sees a parameter in; under ZeRO-3 the parameter itself is flat or empty.

    Example:
        >>> full_shape(torch.ones(2, 3))
        torch.Size([2, 3])
    """
    shape: torch.Size = getattr(p, "ds_shape", p.shape)
    return shape


def is_flat(p: Tensor) -> bool:
    """Return whether ZeRO-3 partitions a parameter, which is then flat or empty; ``full_shape`` is the model's."""
    return hasattr(p, "ds_shape")


def to_local(x: Tensor) -> Tensor:
    """Return the shard of a DTensor that this rank holds; return any other tensor unchanged."""
    tensor: Any = x
    return tensor.to_local() if is_sharded(x) else x


def reduce_over_shards(values: Sequence[Tensor], of: Sequence[Tensor], *, largest: bool = False) -> list[Tensor]:
    """Reduce one scalar per tensor, computed from its local shard, to the scalar of the full tensor.

    All tensors of a mesh share one all-reduce, over the sharded axes of the mesh. Ranks that hold the same shard count
    once.

    Args:
        values: scalars of one dtype, ``values[k]`` computed from the local shard of ``of[k]``.
        of: tensors; the value of one that is not sharded is returned unchanged.
        largest: take the maximum over shards instead of the sum.

    Raises:
        ValueError: for a DTensor with a partial placement, which is yet to be summed over ranks.

    Example:
        >>> reduce_over_shards([torch.tensor(3.0)], [torch.ones(3)])
        [tensor(3.)]
    """
    out = list(values)
    sharded: dict[tuple[Any, int], list[int]] = {}
    for k, x in enumerate(of):
        for mesh, axis in _sharded_axes(x):
            sharded.setdefault((mesh, axis), []).append(k)
    for (mesh, axis), indices in sharded.items():
        stacked = torch.stack([out[k] for k in indices])
        reduce = torch.distributed.ReduceOp
        before_collective()
        torch.distributed.all_reduce(stacked, reduce.MAX if largest else reduce.SUM, mesh.get_group(axis))
        for k, value in zip(indices, stacked.unbind(), strict=True):
            out[k] = value
    return out


def to_numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Return the values of scalars as floats in their order, with one wait of the host for each device.

    Example:
        >>> to_numbers([torch.tensor(3.0), torch.tensor(True)])
        [3.0, 1.0]
    """
    by_device: dict[torch.device, list[int]] = {}
    for k, x in enumerate(scalars):
        by_device.setdefault(x.device, []).append(k)
    out = [0.0] * len(scalars)
    for indices in by_device.values():
        for k, value in zip(indices, torch.stack([scalars[k].double() for k in indices]).tolist(), strict=True):
            out[k] = value
    return out


def _sharded_axes(x: Any) -> list[tuple[Any, int]]:
    """Return (mesh, axis of the mesh) for every axis that ``x`` is sharded over."""
    if not is_sharded(x):
        return []
    if any(placement.is_partial() for placement in x.placements):
        raise ValueError(
            f"a tensor of shape {tuple(x.shape)} is {x.placements}; expected no partial placement. Sum it over "
            "the ranks"
        )
    return [(x.device_mesh, axis) for axis, placement in enumerate(x.placements) if placement.is_shard()]
