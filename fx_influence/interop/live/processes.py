"""The processes of a training run, each with the full model: how work is divided and values are gathered."""

from __future__ import annotations

from typing import TypeVar

from torch.distributed.device_mesh import DeviceMesh

from fx_influence.batching.rows import select_rows
from fx_influence.distributed.collectives import all_gather_objects, mesh_rank
from fx_influence.types import Batch

Value = TypeVar("Value")


def all_gather_values(mesh: DeviceMesh | None, value: Value) -> list[Value]:
    """Return every process's value on every process, rank 0's first.

    Values are pickled, so keep their tensors on the CPU.
    """
    return [value] if mesh is None else all_gather_objects(mesh, value)


def count_and_rank(mesh: DeviceMesh | None) -> tuple[int, int]:
    """Return the number of processes, and this one's rank among them."""
    return (1, 0) if mesh is None else (mesh.size(), mesh_rank(mesh))


def local_slice(count: int, mesh: DeviceMesh | None) -> slice:
    """Return the contiguous slice of ``range(count)`` that belongs to this process; only the last ones are shorter."""
    processes, rank = count_and_rank(mesh)
    size = -(-count // processes)
    return slice(min(count, rank * size), min(count, (rank + 1) * size))


def local_rows(batch: Batch, mesh: DeviceMesh | None) -> Batch:
    """Return this process's rows of a batch that every process holds."""
    return select_rows(batch, local_slice(len(batch.input_ids), mesh))
