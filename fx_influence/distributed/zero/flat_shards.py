"""Parameters that DeepSpeed's ZeRO-3 partitions as DTensors, and the model around them without DeepSpeed's hooks.

Each process has one chunk of every parameter, flattened: the layout of a DTensor of one axis. Passes gather the chunks
as they gather FSDP2's, and view what is gathered in the parameter's shape.
"""

from __future__ import annotations

import copy
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fx_influence.core.dtensor import full_shape, to_local
from fx_influence.distributed.fsdp_gather import shard_like
from fx_influence.distributed.fsdp_model import copy_bare
from fx_influence.policy.model.template import drop_hook_handles, unregistered_tensors


def has_partitioned_parameters(model: nn.Module) -> bool:
    """Return whether ZeRO-3 has partitioned parameters of a model."""
    return any(getattr(p, "ds_tensor", None) is not None for p in model.parameters())


def sharded_parameters(model: nn.Module) -> dict[str, Any]:
    """Return a model's parameters by name, all as flat DTensors if ZeRO-3 has partitioned any.

    These alias the partitions, without the padding at their end, and have ``requires_grad`` and ``ds_shape`` of the
    parameters.
    """
    named = dict(model.named_parameters())
    if not has_partitioned_parameters(model):
        return named
    world = dist.group.WORLD
    assert world is not None
    mesh = DeviceMesh.from_group(world, next(iter(named.values())).device.type)
    return {name: _flat_parameter(p, mesh) for name, p in named.items()}


def flat_shard(partition: Tensor, like: Tensor) -> Tensor:
    """Return the DTensor of which this process holds ``partition``, padded at its end, with the shards of ``like``."""
    return shard_like(partition.detach().narrow(0, 0, len(to_local(like))), like)


def with_flat_shards(model: nn.Module) -> nn.Module:
    """Return a copy of a model that ZeRO-3 has partitioned, without DeepSpeed, whose parameters are flat DTensors.

    Its buffers are those of the model. Any other model is returned itself.
    """
    if not has_partitioned_parameters(model):
        return model
    flat = sharded_parameters(model)
    memo: dict[int, Any] = {id(p): flat[name] for name, p in model.named_parameters()}
    memo |= {id(b): b for b in model.buffers()}
    memo |= {id(x): x for _, _, x in unregistered_tensors(model) if id(x) not in memo}
    copy_bare(list(model.modules()), memo)
    bare: nn.Module = copy.deepcopy(model, memo)
    for module in bare.modules():
        drop_hook_handles(vars(module))
    return bare


def _flat_parameter(p: Any, mesh: DeviceMesh) -> nn.Parameter:
    from torch.distributed.tensor import DTensor, Shard

    shape = full_shape(p)
    count = shape.numel()
    chunk = -(-count // mesh.size())
    start = min(count, mesh.get_local_rank() * chunk)
    # DeepSpeed partitions at the latest when training begins what was added to the model after its own weights.
    partition = p.flatten()[start:] if getattr(p, "ds_tensor", None) is None else p.ds_tensor
    local = partition.detach().narrow(0, 0, min(chunk, count - start))
    layout: dict[str, Any] = {"shape": (count,), "stride": (1,), "run_check": False}
    flat: Any = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], **layout), requires_grad=p.requires_grad)
    flat.ds_shape = shape
    return flat
