"""Many shards gathered in one collective, and gradients summed and scattered to the shards' owners in one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fx_influence.core.dtensor import is_sharded, to_local
from fx_influence.core.tree import promote
from fx_influence.distributed.collectives import all_gather_into

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# torch 2.13 has renamed it
_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Sharding(NamedTuple):
    """How FSDP2 shards a tensor: along ``dim``, in chunks of ``chunk`` (the last may be short or missing).

    ``axis``: the axis of its mesh over which the ``ranks`` shards are dealt; along another, ranks hold copies.
    """

    shape: torch.Size
    dim: int
    chunk: int
    ranks: int
    axis: int

    @property
    def padded(self) -> torch.Size:
        """The shape of every shard, the short ones padded."""
        return torch.Size((*self.shape[: self.dim], self.chunk, *self.shape[self.dim + 1 :]))


def sharding_of(x: Tensor) -> Sharding:
    """Of a DTensor with one sharded axis, the last of its mesh."""
    sharded = cast("DTensor", x)
    mesh, axis = sharded.device_mesh, sharded.device_mesh.ndim - 1
    dim = cast(Any, sharded.placements[axis]).dim
    return Sharding(x.shape, dim, -(-x.shape[dim] // mesh.size(axis)), mesh.size(axis), axis)


def local_slices(x: Tensor) -> list[slice]:
    """Which entries of the whole tensor this rank's part holds."""
    where = [slice(0, n) for n in x.shape]
    if is_sharded(x):
        how = sharding_of(x)
        start = min(cast("DTensor", x).device_mesh.get_local_rank(how.axis) * how.chunk, x.shape[how.dim])
        where[how.dim] = slice(start, start + to_local(x).shape[how.dim])
    return where


def shard_like(part: Tensor, like: Tensor) -> Tensor:
    """The DTensor of which this rank holds ``part``, sharded as ``like``."""
    from torch.distributed.tensor import DTensor

    x = cast("DTensor", like)
    how: dict[str, Any] = {"shape": x.shape, "stride": x.stride(), "run_check": False}
    return DTensor.from_local(part, x.device_mesh, x.placements, **how)


def shard_group(x: Tensor) -> dist.ProcessGroup:
    """The ranks that hold the shards of a DTensor between them."""
    sharded = cast("DTensor", x)
    return sharded.device_mesh.get_group(sharding_of(x).axis)


class PendingGather(NamedTuple):
    """Whole tensors on their way to every rank: ``wait`` for them, or have them ``whole``."""

    shards: Sequence[Tensor]
    flat: dict[torch.dtype, Tensor]
    works: list[Any]

    def wait(self) -> None:
        for work in self.works:
            work.wait()

    def whole(self) -> list[Tensor]:
        """The tensors in the order of the shards, contiguous."""
        self.wait()
        place = dict.fromkeys(self.flat, 0)
        out = []
        for shard in self.shards:
            how, start = sharding_of(shard), place[shard.dtype]
            place[shard.dtype] = start + math.prod(how.padded)
            parts = self.flat[shard.dtype][:, start : place[shard.dtype]].unflatten(1, how.padded)
            joined = parts.movedim(0, how.dim).flatten(how.dim, how.dim + 1)
            out.append(joined.narrow(how.dim, 0, how.shape[how.dim]).contiguous())
        return out


def gather(shards: Sequence[Tensor]) -> PendingGather:
    """Starts the gathering of DTensors that one group of ranks holds, in one collective for each dtype."""
    flat: dict[torch.dtype, Tensor] = {}
    works = []
    for dtype in dict.fromkeys(x.dtype for x in shards):
        own = [_padded(to_local(x), sharding_of(x).padded).flatten() for x in shards if x.dtype == dtype]
        joined = torch.cat(own)
        first = next(x for x in shards if x.dtype == dtype)
        flat[dtype] = joined.new_empty(sharding_of(first).ranks, len(joined))
        works.append(all_gather_into(flat[dtype].view(-1), joined, group=shard_group(first), async_op=True))
    return PendingGather(shards, flat, works)


def reduce_scatter(whole: Sequence[Tensor | None], shards: Sequence[Tensor]) -> list[Tensor | None]:
    """Each rank's own part of the sums over ranks of whole tensors, at least float32; None where no rank has any.

    ``shards``: DTensors that one group of ranks holds and that are sharded as the sums are to be. One collective.
    """
    how = [sharding_of(x) for x in shards]
    # With the sums goes how many ranks have the tensor; only who lacks it needs to look.
    dtype = promote(max((x.dtype for x in shards), key=lambda dtype: dtype.itemsize))
    sizes = [math.prod(one.padded) for one in how]
    table = to_local(shards[0]).new_zeros(how[0].ranks, sum(sizes) + len(sizes), dtype=dtype)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    for k, (x, one) in enumerate(zip(whole, how, strict=True)):
        if x is not None:
            dealt = torch.Size((*one.shape[: one.dim], one.ranks * one.chunk, *one.shape[one.dim + 1 :]))
            parts = _padded(x, dealt).unflatten(one.dim, (one.ranks, one.chunk)).movedim(one.dim, 0)
            table[:, starts[k] : starts[k] + sizes[k]] = parts.flatten(1)
            table[:, sum(sizes) + k] = 1
    own = table.new_empty(table.shape[1])
    _scatter(own, table.view(-1), group=shard_group(shards[0]))
    out: list[Tensor | None] = []
    for k, (x, shard, one) in enumerate(zip(whole, shards, how, strict=True)):
        part = own[starts[k] : starts[k] + sizes[k]].view(one.padded)
        length = to_local(shard).shape[one.dim]
        out.append(None if x is None and not own[sum(sizes) + k] else part.narrow(one.dim, 0, length))
    return out


def _padded(x: Tensor, shape: torch.Size) -> Tensor:
    if x.shape == shape:
        return x
    return F.pad(x, [n for old, new in zip(reversed(x.shape), reversed(shape), strict=True) for n in (0, new - old)])
