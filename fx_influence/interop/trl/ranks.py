"""The processes of a TRL training, each with the whole model: which share of the work is whose, and what they tell."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fx_influence.batching.rows import select_rows
from fx_influence.core.dtensor import is_sharded
from fx_influence.distributed.collectives import all_gather_objects, mesh_rank
from fx_influence.types import Batch

Value = TypeVar("Value")


def check_processes(trainer: Any) -> None:
    """Raise ``ValueError`` for a trainer whose processes do not each hold the whole model, naming how they share it."""
    kind = str(trainer.accelerator.distributed_type.value)
    ways = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        kind: kind != "NO" and not kind.startswith("MULTI_"),
        "tensor parallelism": any(is_sharded(p) for p in trainer.model.parameters()),
    }
    for way, in_use in ways.items():
        if in_use:
            raise ValueError(
                f"the trainer runs in {trainer.accelerator.num_processes} processes under {way}; its steps can be "
                "attributed where every process holds the whole model: launch one process, or several with "
                "DistributedDataParallel (accelerate launch --multi_gpu)"
            )


def mesh_of(trainer: Any) -> DeviceMesh | None:
    """The mesh of the trainer's processes; None where there is one."""
    if trainer.accelerator.num_processes == 1:
        return None
    everyone = dist.group.WORLD
    assert everyone is not None
    return DeviceMesh.from_group(everyone, trainer.accelerator.device.type)


def of_all(mesh: DeviceMesh | None, value: Value) -> list[Value]:
    """Every process's value, rank 0's first, on every process; values are pickled, so keep tensors on the CPU."""
    return [value] if mesh is None else all_gather_objects(mesh, value)


def place(mesh: DeviceMesh | None) -> tuple[int, int]:
    """How many processes there are, and which of them this one is."""
    return (1, 0) if mesh is None else (mesh.size(), mesh_rank(mesh))


def share(count: int, mesh: DeviceMesh | None) -> slice:
    """Which of ``count`` things in order are this process's: as many as any other's, but for the last ones'."""
    ranks, rank = place(mesh)
    each = -(-count // ranks)
    return slice(min(count, rank * each), min(count, (rank + 1) * each))


def own_rows(batch: Batch, mesh: DeviceMesh | None) -> Batch:
    """This process's share of a batch that every process holds."""
    return select_rows(batch, share(len(batch.input_ids), mesh))
