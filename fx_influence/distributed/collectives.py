"""What the ranks of a device mesh tell each other, and what they must have been given alike."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Value = TypeVar("Value")

if dist.is_available():
    # Its functions have as a default the group that there is when torch first needs them, as torch.func.jvp does. They
    # would keep the caller's, and a thread of a group that is alive when the interpreter ends can abort the process.
    importlib.import_module("torch.distributed.nn.functional")

# torch 2.13 has renamed it, and a torch may be built without any
all_gather_into: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class RankError(RuntimeError):
    """An exception on another rank, raised on this one by ``propagate_failures``."""


_propagating: ContextVar[bool] = ContextVar("propagating", default=False)


@contextmanager
def propagate_failures(mesh: DeviceMesh | None) -> Iterator[None]:
    """Make an exception on one rank leave the block on all ranks, so that none waits for it in a collective for ever.

    Every collective of this module inside the block, and the end of the block, begins with one number from each rank:
    whether it has failed. ``mesh``: all ranks that enter the block; None changes nothing, and neither does a block
    inside another. Exceptions that are not ``Exception``, such as ``KeyboardInterrupt``, are not announced.

    Raises on the failing rank what was raised there, and ``RankError`` with its text on the others.
    """
    if mesh is None or _propagating.get():
        yield
        return
    token = _propagating.set(True)
    try:
        yield
        _announce(mesh, None)
    except RankError:
        raise
    except Exception as error:
        _announce(mesh, f"{type(error).__name__}: {error}")
        raise
    finally:
        _propagating.reset(token)


def _announce(mesh: DeviceMesh, problem: str | None) -> None:
    """Tell the other ranks of a problem here, or None; raise ``RankError`` where there is none here but elsewhere."""
    failed = torch.tensor(float(problem is not None), device=mesh.device_type)
    for group in _groups(mesh):
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if not failed:
        return
    everyone = _collected(mesh, problem)
    if problem is None:
        rank, text = next((rank, text) for rank, text in enumerate(everyone) if text is not None)
        raise RankError(f"on rank {rank}: {text}")


def _before_collective(mesh: DeviceMesh) -> None:
    if _propagating.get():
        _announce(mesh, None)


def mesh_rank(mesh: DeviceMesh) -> int:
    """This rank's place in the mesh, counted along its last axis first."""
    return int((mesh.mesh.flatten() == dist.get_rank()).nonzero())


def all_gather_objects(mesh: DeviceMesh, value: Value) -> list[Value]:
    """Every rank's value in the order of the mesh; values are pickled, as is safe among ranks of one job."""
    _before_collective(mesh)
    return _collected(mesh, value)


def _collected(mesh: DeviceMesh, value: Value) -> list[Value]:
    found = [value]
    for group in _groups(mesh):
        lists: list[list[Value]] = [[] for _ in range(group.size())]
        dist.all_gather_object(lists, found, group=group)
        found = [one for some in lists for one in some]
    return found


def all_gather(mesh: DeviceMesh, own: Tensor) -> Tensor:
    """Every rank's tensor of one shape, (ranks, ...), in the order of the mesh."""
    _before_collective(mesh)
    # gloo gathers no bool
    found = (own.to(torch.uint8) if own.dtype == torch.bool else own).contiguous().unsqueeze(0)
    for group in _groups(mesh):
        everyone = found.new_empty(group.size() * len(found), *own.shape)
        all_gather_into(everyone, found, group=group)
        found = everyone
    return found.to(own.dtype)


def sum_over_ranks(mesh: DeviceMesh, tensors: list[Tensor]) -> None:
    """In place, every rank's sum of the same tensors."""
    _before_collective(mesh)
    for group in _groups(mesh):
        for work in [dist.all_reduce(x, group=group, async_op=True) for x in tensors]:
            work.wait()


def _groups(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    # The last axis first: what is gathered along the others then follows in the order of the mesh.
    return [mesh.get_group(axis) for axis in reversed(range(mesh.ndim))]


def raise_on_all_ranks(mesh: DeviceMesh, call: Callable[[], Value]) -> Value:
    """What ``call`` gives, which needs no other rank; what is raised on one is raised on all, or they would wait.

    That holds for ``OSError``, ``TypeError`` and ``ValueError``; the lowest such rank is named.
    """
    found: list[Value] = []
    problem: tuple[type[Exception], str] | None = None
    try:
        found.append(call())
    except (OSError, TypeError, ValueError) as error:
        problem = type(error), str(error)
    for rank, theirs in enumerate(all_gather_objects(mesh, problem)):
        if theirs is not None:
            raise theirs[0](f"on rank {rank}: {theirs[1]}")
    return found[0]
