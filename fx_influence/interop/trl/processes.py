"""The mesh of a TRL trainer's processes, replicated or sharded."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def mesh_of(trainer: Any) -> DeviceMesh | None:
    """Return the mesh of the trainer's processes, None for a single process."""
    if trainer.accelerator.num_processes == 1:
        return None
    world = dist.group.WORLD
    assert world is not None
    return DeviceMesh.from_group(world, trainer.accelerator.device.type)
