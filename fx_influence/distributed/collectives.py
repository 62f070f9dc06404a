"""Collectives over all ranks of a device mesh, and exceptions that one rank raises on all."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fx_influence.core.dtensor import announcement, before_collective

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Value = TypeVar("Value")

BUCKET_BYTES = 2**24
"""Largest copy of tensors that are sent together."""

if dist.is_available():
    # Imported before any process group exists, because its functions bind the default group of the moment when torch
    # first imports them, as torch.func.jvp does. They would keep the caller's group alive, and a gloo thread that is
    # alive when the interpreter ends can abort the process.
    importlib.import_module("torch.distributed.nn.functional")

# torch 2.13 renamed it, and a torch may be built without any.
all_gather_into: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class RankError(RuntimeError):
    """An exception of another rank, raised on this one by ``propagate_failures``."""


@contextmanager
def propagate_failures(mesh: DeviceMesh | None) -> Iterator[None]:
    """Make an exception on one rank leave the block on all ranks, so that no rank waits forever in a collective.

    Every collective of the library inside the block, and the end of the block, begins with one number from each rank:
    whether it has failed. Exceptions that are not ``Exception``, such as ``KeyboardInterrupt``, are not announced.

    Args:
        mesh: all ranks that enter the block; None changes nothing, and neither does a block inside another.

    Raises:
        Exception: on the failing rank, its own exception.
        RankError: on the other ranks, with the text of that exception.
    """
    if mesh is None or announcement.get() is not None:
        yield
        return
    token = announcement.set(functools.partial(_announce, mesh, None))
    try:
        yield
        _announce(mesh, None)
    except RankError:
        raise
    except Exception as error:
        _announce(mesh, f"{type(error).__name__}: {error}")
        raise
    finally:
        announcement.reset(token)


def _announce(mesh: DeviceMesh, problem: str | None) -> None:
    """Send this rank's problem, or None, to the other ranks; raise ``RankError`` if only other ranks have one."""
    failed = torch.tensor(float(problem is not None), device=mesh.device_type)
    for group in _groups(mesh):
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if not failed:
        return
    problems = _gather_objects(mesh, problem)
    if problem is None:
        rank, text = next((rank, text) for rank, text in enumerate(problems) if text is not None)
        raise RankError(f"on rank {rank}: {text}")


def mesh_rank(mesh: DeviceMesh) -> int:
    """Return this process's index in the mesh, whose last axis counts fastest."""
    return int((mesh.mesh.flatten() == dist.get_rank()).nonzero())


def all_gather_objects(mesh: DeviceMesh, value: Value) -> list[Value]:
    """Return every rank's value in the order of the mesh; values are pickled, as is safe among ranks of one job."""
    before_collective()
    return _gather_objects(mesh, value)


def _gather_objects(mesh: DeviceMesh, value: Value) -> list[Value]:
    values = [value]
    for group in _groups(mesh):
        by_rank: list[list[Value]] = [[] for _ in range(group.size())]
        dist.all_gather_object(by_rank, values, group=group)
        values = [value for gathered in by_rank for value in gathered]
    return values


def all_gather(mesh: DeviceMesh, local: Tensor) -> Tensor:
    """Return every rank's tensor of one shape, (ranks, ...), in the order of the mesh."""
    # As bytes, because gloo gathers no bool.
    gathered = (local.to(torch.uint8) if local.dtype == torch.bool else local).contiguous().unsqueeze(0)
    for group in _groups(mesh):
        out = gathered.new_empty(group.size() * len(gathered), *local.shape)
        before_collective()
        all_gather_into(out, gathered, group=group)
        gathered = out
    return gathered.to(local.dtype)


def sum_over_ranks(mesh: DeviceMesh, tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its sum over all ranks, in place."""
    sum_over_groups(_groups(mesh), tensors)


def sum_over_groups(groups: Sequence[dist.ProcessGroup], tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its sum over the ranks of one group after the other, in place.

    Small ones are sent together, since each collective takes as long as some kilobytes. Every rank has tensors of the
    same shapes in the same order.
    """
    if not groups:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([x.flatten() for x in bucket]) if len(bucket) > 1 else bucket[0]
        for group in groups:
            before_collective()
            dist.all_reduce(flat, group=group)
        if len(bucket) > 1:
            for x, total in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
                x.copy_(total.view_as(x))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in turn, as many as fit ``BUCKET_BYTES`` at once, all of one dtype; larger ones alone."""
    bucket: list[Tensor] = []
    size = 0
    for x in tensors:
        if bucket and (x.dtype != bucket[0].dtype or size + x.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(x)
        size += x.nbytes
    if bucket:
        yield bucket


def _groups(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    # The last axis first, so that the results gathered along the others follow in the order of the mesh.
    return [mesh.get_group(axis) for axis in reversed(range(mesh.ndim))]


def raise_on_all_ranks(mesh: DeviceMesh, call: Callable[[], Value]) -> Value:
    """Run ``call`` locally and return its result. If it raises on any rank, raise on all, so that no rank deadlocks.

    That holds for ``OSError``, ``TypeError`` and ``ValueError``; the lowest rank that raised is named.

    Args:
        mesh: all ranks that make this call.
        call: function without collectives.
    """
    results: list[Value] = []
    problem: tuple[type[Exception], str] | None = None
    try:
        results.append(call())
    except (OSError, TypeError, ValueError) as error:
        problem = type(error), str(error)
    for rank, raised in enumerate(all_gather_objects(mesh, problem)):
        if raised is not None:
            raise raised[0](f"on rank {rank}: {raised[1]}")
    return results[0]
