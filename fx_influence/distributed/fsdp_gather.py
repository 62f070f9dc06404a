"""All-gather of many FSDP2 shards and reduce-scatter of their gradients, in one collective each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fx_influence.core.dtensor import before_collective, is_sharded, to_local
from fx_influence.core.tree import promote
from fx_influence.distributed.collectives import all_gather_into

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# torch 2.13 renamed it.
reduce_scatter_into: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Sharding(NamedTuple):
    """Layout of a tensor that FSDP2 shards along ``dim``, in chunks of ``chunk`` (the last may be short or missing).

    ``shape``: of the full tensor. ``ranks``: number of shards. ``axis``: axis of the mesh over which they are
    distributed; along another axis, ranks hold copies.
    """

    shape: torch.Size
    dim: int
    chunk: int
    ranks: int
    axis: int

    @property
    def padded(self) -> torch.Size:
        """Shape of every shard once the short ones are padded."""
        return torch.Size((*self.shape[: self.dim], self.chunk, *self.shape[self.dim + 1 :]))


def sharding_of(x: Tensor) -> Sharding:
    """Return the layout of a DTensor that is sharded over the last axis of its mesh only."""
    sharded = cast("DTensor", x)
    mesh, axis = sharded.device_mesh, sharded.device_mesh.ndim - 1
    dim = cast(Any, sharded.placements[axis]).dim
    return Sharding(x.shape, dim, -(-x.shape[dim] // mesh.size(axis)), mesh.size(axis), axis)


def local_slices(x: Tensor) -> list[slice]:
    """Return the slices of the full tensor that this rank's shard holds; all of it for a plain tensor."""
    slices = [slice(0, n) for n in x.shape]
    if is_sharded(x):
        sharding = sharding_of(x)
        rank = cast("DTensor", x).device_mesh.get_local_rank(sharding.axis)
        start = min(rank * sharding.chunk, x.shape[sharding.dim])
        slices[sharding.dim] = slice(start, start + to_local(x).shape[sharding.dim])
    return slices


def shard_like(local: Tensor, like: Tensor) -> Tensor:
    """Return the DTensor whose shard on this rank is ``local``, sharded as ``like``."""
    from torch.distributed.tensor import DTensor

    x = cast("DTensor", like)
    full: dict[str, Any] = {"shape": x.shape, "stride": x.stride(), "run_check": False}
    return DTensor.from_local(local, x.device_mesh, x.placements, **full)


def shard_group(x: Tensor) -> dist.ProcessGroup:
    """Return the group of ranks over which the shards of a DTensor are distributed."""
    sharded = cast("DTensor", x)
    return sharded.device_mesh.get_group(sharding_of(x).axis)


class PendingGather(NamedTuple):
    """All-gather under way: ``wait`` for it, or get its ``result``.

    ``shards``: the DTensors. ``buffers``: (ranks, n) by dtype, filled by the collectives ``works``.
    """

    shards: Sequence[Tensor]
    buffers: dict[torch.dtype, Tensor]
    works: list[Any]

    def wait(self) -> None:
        """Wait for the collectives."""
        for work in self.works:
            work.wait()

    def result(self) -> list[Tensor]:
        """Return the full tensors in the order of the shards, contiguous."""
        self.wait()
        offsets = dict.fromkeys(self.buffers, 0)
        full = []
        for shard in self.shards:
            sharding, start = sharding_of(shard), offsets[shard.dtype]
            stop = offsets[shard.dtype] = start + math.prod(sharding.padded)
            by_rank = self.buffers[shard.dtype][:, start:stop].unflatten(1, sharding.padded)
            joined = by_rank.movedim(0, sharding.dim).flatten(sharding.dim, sharding.dim + 1)
            full.append(joined.narrow(sharding.dim, 0, sharding.shape[sharding.dim]).contiguous())
        return full


def start_all_gather(shards: Sequence[Tensor]) -> PendingGather:
    """Start the all-gather of DTensors that one group of ranks holds, in one collective per dtype."""
    buffers: dict[torch.dtype, Tensor] = {}
    collectives = []
    for dtype in dict.fromkeys(x.dtype for x in shards):
        same_dtype = [x for x in shards if x.dtype == dtype]
        local = torch.cat([_pad(to_local(x), sharding_of(x).padded).flatten() for x in same_dtype])
        buffers[dtype] = local.new_empty(sharding_of(same_dtype[0]).ranks, len(local))
        group = shard_group(same_dtype[0])
        collectives.append(partial(all_gather_into, buffers[dtype].view(-1), local, group=group, async_op=True))
    before_collective()
    return PendingGather(shards, buffers, [start() for start in collectives])


def reduce_scatter(full: Sequence[Tensor | None], shards: Sequence[Tensor]) -> list[Tensor | None]:
    """Sum full tensors over ranks, in one collective.

    Args:
        full: this rank's terms of the sums, of the shards' shapes or, where the shards are flat, of any; None where it
            has none.
        shards: DTensors that one group of ranks holds and that are sharded as the sums are to be.

    Returns:
        This rank's shard of each sum, at least float32; None where no rank has a term.
    """
    shardings = [sharding_of(x) for x in shards]
    # The number of ranks that have each tensor is summed along with it; only a rank without it reads that number.
    dtype = promote(max((x.dtype for x in shards), key=lambda dtype: dtype.itemsize))
    sizes = [math.prod(sharding.padded) for sharding in shardings]
    table = to_local(shards[0]).new_zeros(shardings[0].ranks, sum(sizes) + len(sizes), dtype=dtype)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    for k, (x, sharding) in enumerate(zip(full, shardings, strict=True)):
        if x is not None:
            x = x.reshape(sharding.shape)
            dim, ranks, chunk = sharding.dim, sharding.ranks, sharding.chunk
            padded = _pad(x, torch.Size((*sharding.shape[:dim], ranks * chunk, *sharding.shape[dim + 1 :])))
            by_rank = padded.unflatten(dim, (ranks, chunk)).movedim(dim, 0)
            table[:, starts[k] : starts[k] + sizes[k]] = by_rank.flatten(1)
            table[:, sum(sizes) + k] = 1
    local = table.new_empty(table.shape[1])
    before_collective()
    reduce_scatter_into(local, table.view(-1), group=shard_group(shards[0]))
    sums: list[Tensor | None] = []
    for k, (x, shard, sharding) in enumerate(zip(full, shards, shardings, strict=True)):
        padded = local[starts[k] : starts[k] + sizes[k]].view(sharding.padded)
        length = to_local(shard).shape[sharding.dim]
        sums.append(None if x is None and not local[sum(sizes) + k] else padded.narrow(sharding.dim, 0, length))
    return sums


def _pad(x: Tensor, shape: torch.Size) -> Tensor:
    """Return x padded with zeros at the end of each axis."""
    if x.shape == shape:
        return x
    return F.pad(x, [n for old, new in zip(reversed(x.shape), reversed(shape), strict=True) for n in (0, new - old)])
