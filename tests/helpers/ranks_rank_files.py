"""Run on each rank: a training run sharded by FSDP, saved as verl's FSDPCheckpointManager saves it.

Beside the checkpoint every rank saves the complete weights and moments as torch gathers them.
"""

from __future__ import annotations

import functools
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM

from helpers.ranks import end_rank, global_mesh, save_result


def step_twice(model: nn.Module) -> torch.optim.AdamW:
    """Return the optimizer after two steps on other rows on each rank."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(2):
        ids = torch.randint(3, 12, (2, 6), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def save(out: Path, kind: str, value: Any) -> None:
    """Save the file of this rank under verl's name."""
    torch.save(value, out / f"{kind}_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt")


def save_fsdp2(model: Any, mesh: DeviceMesh, out: Path) -> dict[str, Any]:
    """Shard by ``fully_shard``, train and save; return the complete weights and states by name."""
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    optimizer = step_twice(model)
    save(out, "model", model.state_dict())
    save(out, "optim", optimizer.state_dict())
    state = {
        name: {key: value.full_tensor() if value.ndim else value for key, value in optimizer.state[p].items()}
        for name, p in model.named_parameters()
    }
    return {"weights": {name: value.full_tensor() for name, value in model.state_dict().items()}, "state": state}


def save_fsdp1(model: Any, mesh: DeviceMesh, out: Path) -> dict[str, Any]:
    """Shard by FSDP1 into flat parameters, as verl's default does, train and save; return as ``save_fsdp2``."""
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(model.model.layers[0])})
    options: dict[str, Any] = {"auto_wrap_policy": policy, "device_mesh": mesh, "device_id": torch.device("cpu")}
    if mesh.ndim == 2:
        from torch.distributed.fsdp import ShardingStrategy

        options["sharding_strategy"] = ShardingStrategy.HYBRID_SHARD
    sharded = FSDP(model, use_orig_params=False, **options)
    optimizer = step_twice(sharded)
    kind = StateDictType.SHARDED_STATE_DICT
    with FSDP.state_dict_type(sharded, kind, ShardedStateDictConfig(), ShardedOptimStateDictConfig()):
        save(out, "model", sharded.state_dict())
        save(out, "optim", optimizer.state_dict())
    complete = FullStateDictConfig(rank0_only=False), FullOptimStateDictConfig(rank0_only=False)
    with FSDP.state_dict_type(sharded, StateDictType.FULL_STATE_DICT, *complete):
        state = FSDP.optim_state_dict(sharded, optimizer)["state"]
        return {"weights": dict(sharded.state_dict()), "state": state}


def main(out: str, base: str, version: str, *shape: str) -> None:
    """Train a model of ``base`` and save it to ``out``/actor."""
    warnings.simplefilter("ignore")
    names = ("ddp", "fsdp") if len(shape) == 2 else ("fsdp",)
    with global_mesh(*map(int, shape)) as unnamed:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", tuple(unnamed.mesh.shape), mesh_dim_names=names)
        model = AutoModelForCausalLM.from_pretrained(base)
        actor = Path(out) / "actor"
        actor.mkdir(exist_ok=True)
        saved = (save_fsdp1 if version == "fsdp1" else save_fsdp2)(model, mesh, actor)
        save_result(out, saved)
    end_rank()


if __name__ == "__main__":
    main(*sys.argv[1:])
