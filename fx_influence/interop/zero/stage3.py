"""The partitions of DeepSpeed's ZeRO stage 3: moments and gradients as flat DTensors, sharded as the parameters are.

Each process holds one chunk of every parameter. The optimizer lays the chunks of a sub-group's parameters one after
another: float32 weights, moments, and at its step the gradient averaged over processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from fx_influence.core.dtensor import to_local
from fx_influence.distributed.zero.flat_shards import flat_shard, sharded_parameters
from fx_influence.interop.zero.roundings import check_roundings, count_unrounded
from fx_influence.types import Gradients, Params


def is_stage3(optimizer: object) -> bool:
    """Return whether an object is DeepSpeed's optimizer of ZeRO-3, by its sub-groups and the chunks' places in them."""
    return all(hasattr(optimizer, name) for name in ("fp32_partitioned_groups_flat", "grad_position"))


class _Chunk(NamedTuple):
    """This process's chunk of a parameter: its place in the flat vector of a sub-group, padding included."""

    name: str
    sub_group: int
    start: int
    size: int

    def shard_of(self, vector: Tensor, like: Tensor) -> Tensor:
        """Return the chunk of a sub-group's vector as a DTensor sharded as the flat parameter ``like``."""
        return flat_shard(vector.narrow(0, self.start, self.size), like)


def _chunks(optimizer: Any, model: nn.Module) -> Iterator[_Chunk]:
    names = _names(model)
    for index, members in enumerate(optimizer.fp16_groups):
        for p in members:
            _, start, size = optimizer.grad_position[optimizer.get_param_id(p)]
            yield _Chunk(names[p], index, start, size)


class FlatAdamW(NamedTuple):
    """AdamW as it would hold the flat parameters itself, with the attributes of torch's.

    Attributes:
        param_groups: hyperparameters, and ``params``.
        state: by parameter, ``step`` and the moments.
    """

    param_groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Any]]


def flat_adamw(optimizer: Any, model: nn.Module, parameters: Mapping[str, Tensor]) -> FlatAdamW:
    """Return the AdamW inside DeepSpeed's optimizer, by parameter; its moments alias those in the sub-groups.

    Args:
        optimizer: DeepSpeed's.
        model: the policy.
        parameters: its ``sharded_parameters``.
    """
    adamw = optimizer.optimizer
    groups: list[dict[str, Any]] = [{**group, "params": []} for group in adamw.param_groups]
    state: dict[Tensor, dict[str, Any]] = {}
    for chunk in _chunks(optimizer, model):
        # The state is a defaultdict: indexing it would create an entry.
        stored = adamw.state.get(optimizer.fp32_partitioned_groups_flat[chunk.sub_group], {})
        flat = parameters[chunk.name]
        groups[optimizer.sub_group_to_group_id[chunk.sub_group]]["params"].append(flat)
        state[flat] = {key: chunk.shard_of(x, flat) if x.dim() else x for key, x in stored.items()}
    return FlatAdamW(groups, state)


def flat_masters(optimizer: Any, model: nn.Module, parameters: Mapping[str, Tensor]) -> Params | None:
    """Return the float32 weights that AdamW moves, by name, as flat DTensors that alias those in the sub-groups.

    None where the parameters are these themselves, in float32. Every process makes the call.

    Args:
        optimizer: DeepSpeed's.
        model: the policy.
        parameters: its ``sharded_parameters``.

    Raises:
        ValueError: where a parameter is not the rounding of the weights that AdamW moves, on every process.
    """
    masters = {}
    for chunk in _chunks(optimizer, model):
        flat = parameters[chunk.name]
        masters[chunk.name] = chunk.shard_of(optimizer.fp32_partitioned_groups_flat[chunk.sub_group], flat)
    check_roundings([count_unrounded(to_local(parameters[name]), to_local(x)) for name, x in masters.items()])
    trained = {name: x for name, x in masters.items() if parameters[name].requires_grad}
    return trained if any(parameters[name].dtype != x.dtype for name, x in trained.items()) else None


def gradient_at_step(optimizer: Any, model: nn.Module) -> Gradients:
    """Return the gradient of the step that DeepSpeed is about to make, before it is clipped, by name, as flat DTensors.

    A trained parameter that the optimizer does not hold has None.
    """
    parameters, names = sharded_parameters(model), _names(model)
    gradient: Gradients = {name: None for name, p in parameters.items() if p.requires_grad}
    for index, members in enumerate(optimizer.fp16_groups):
        for p, partition in zip(members, optimizer.averaged_gradients[index], strict=True):
            gradient[names[p]] = flat_shard(partition, parameters[names[p]])
    return gradient


def check_chunks(optimizer: Any) -> None:
    """Raise ``ValueError`` for an optimizer of ZeRO-3 whose partitions are not read, with the remedy.

    Args:
        optimizer: DeepSpeed's, without wrappers.
    """
    world = dist.get_world_size()
    counts = {dist.get_world_size(p.ds_process_group) for p in optimizer.module.parameters()}
    if counts != {world} or optimizer.zero_hpz_partition_size > 1 or type(optimizer).__name__ == "MiCS_Optimizer":
        raise ValueError(
            f"DeepSpeed partitions parameters over groups of the {world} processes; expected one partition over all. "
            "Leave zero_hpz_partition_size, mics_shard_size and expert parallelism out of its configuration"
        )
    offload = optimizer.parameter_offload
    if offload.zero_quantized_weights or offload.zero_quantized_nontrainable_weights:
        raise ValueError(
            "DeepSpeed quantises the weights that it gathers; expected their own precision. Leave "
            "zero_quantized_weights and zero_quantized_nontrainable_weights out of its configuration"
        )


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {p: name for name, p in model.named_parameters()}
