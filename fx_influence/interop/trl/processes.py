"""The mesh of a TRL trainer's processes, and whether they shard the model."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fx_influence.core.dtensor import is_sharded


def mesh_of(trainer: Any) -> DeviceMesh | None:
    """Return the mesh of the trainer's processes, None for a single process."""
    if trainer.accelerator.num_processes == 1:
        return None
    world = dist.group.WORLD
    assert world is not None
    return DeviceMesh.from_group(world, trainer.accelerator.device.type)


def is_sharded_training(trainer: Any) -> bool:
    """Return whether the trainer's model is sharded, or will be when training begins."""
    sharded = trainer.is_fsdp_enabled or sharder(trainer) == "ZeRO-3"
    return bool(sharded) or any(map(is_sharded, trainer.model.parameters()))


def sharder(trainer: Any) -> str:
    """Return what shards the trainer's model, if anything does."""
    if not trainer.is_deepspeed_enabled:
        return "FSDP"
    return f"ZeRO-{trainer.accelerator.state.deepspeed_plugin.zero_stage}"
