"""Run on each rank: a training run sharded by FSDP, saved as verl's FSDPCheckpointManager saves it.

Beside the checkpoint every rank saves the complete weights and moments as torch gathers them.
"""

from __future__ import annotations

import functools
import json
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
from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy
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
    for module in (*(m for m in model.modules() if type(m).__name__ == "Qwen2DecoderLayer"), model):
        fully_shard(module, mesh=mesh)
    optimizer = step_twice(model)
    save(out, "model", model.state_dict())
    save(out, "optim", optimizer.state_dict())
    state = {
        name: {key: value.full_tensor() if value.ndim else value for key, value in optimizer.state[p].items()}
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return {"weights": {name: value.full_tensor() for name, value in model.state_dict().items()}, "state": state}


def is_lora_leaf(module: nn.Module) -> bool:
    """Return whether verl's get_fsdp_wrap_policy wraps a module of a model with LoRA."""
    weight = getattr(module, "weight", None)
    return not list(module.named_children()) and weight is not None and weight.requires_grad


def wrap_policy(model: nn.Module) -> Any:
    """Return verl's policy: each layer, and with LoRA each of its matrices."""
    layers = [module for module in model.modules() if type(module).__name__ == "Qwen2DecoderLayer"]
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(layers[0])})
    leaf_policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=is_lora_leaf)
    return functools.partial(_or_policy, policies=[leaf_policy, policy]) if hasattr(model, "peft_config") else policy


def save_fsdp1(model: Any, mesh: DeviceMesh, out: Path, variant: str) -> dict[str, Any]:
    """Shard by FSDP1 into flat parameters, as verl's default does, train and save; return as ``save_fsdp2``.

    Words in ``variant``: ``orig`` for use_orig_params, ``group`` for a process group in place of the mesh, whose shards
    are ``ShardedTensor``s, ``named`` for the optimizer's state by name, ``only`` for the adapter's weights alone.
    """
    options: dict[str, Any] = {"auto_wrap_policy": wrap_policy(model), "device_id": torch.device("cpu")}
    if "group" not in variant:
        options["device_mesh"] = mesh
    if mesh.ndim == 2:
        from torch.distributed.fsdp import ShardingStrategy

        options["sharding_strategy"] = ShardingStrategy.HYBRID_SHARD
    sharded = FSDP(model, use_orig_params="orig" in variant, **options)
    optimizer = step_twice(sharded)
    kind = StateDictType.SHARDED_STATE_DICT
    with FSDP.state_dict_type(sharded, kind, ShardedStateDictConfig(), ShardedOptimStateDictConfig()):
        weights = sharded.state_dict()
        save(out, "model", {k: v for k, v in weights.items() if "lora_" in k} if "only" in variant else weights)
        save(out, "optim", FSDP.optim_state_dict(sharded, optimizer) if "named" in variant else optimizer.state_dict())
    # On CPUs torch's offloading returns both moments in one buffer, with use_orig_params.
    complete = (FullStateDictConfig(rank0_only=False), FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False))
    with FSDP.state_dict_type(sharded, StateDictType.FULL_STATE_DICT, *complete):
        state = FSDP.optim_state_dict(sharded, optimizer)["state"]
        return {"weights": dict(sharded.state_dict()), "state": state}


def with_lora(model: Any, actor: Path) -> Any:
    """Return the model under an adapter, as verl's _build_lora_module; save of its config what verl saves."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, target_modules="all-linear", bias="none")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero would leave the gradients of lora_A zero in the first step
            nn.init.normal_(parameter, std=0.1)
    meta = {"r": config.r, "lora_alpha": config.lora_alpha, "task_type": "CAUSAL_LM"}
    (actor / "lora_train_meta.json").write_text(json.dumps(meta))
    return adapted


def main(out: str, base: str, variants: str, *shape: str) -> None:
    """Train a model of ``base`` and save it to ``out``/VARIANT/actor, for each variant."""
    warnings.simplefilter("ignore")
    names = ("ddp", "fsdp") if len(shape) == 2 else ("fsdp",)
    saved = {}
    with global_mesh(*map(int, shape)) as unnamed:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", tuple(unnamed.mesh.shape), mesh_dim_names=names)
        for variant in variants.split(","):
            torch.manual_seed(0)
            actor = Path(out) / variant / "actor"
            actor.mkdir(parents=True, exist_ok=True)
            model = AutoModelForCausalLM.from_pretrained(base)
            model = with_lora(model, actor) if "lora" in variant else model
            if "fsdp1" in variant:
                saved[variant] = save_fsdp1(model, mesh, actor, variant)
            else:
                saved[variant] = save_fsdp2(model, mesh, actor)
        save_result(out, saved)
    end_rank()


if __name__ == "__main__":
    main(*sys.argv[1:])
