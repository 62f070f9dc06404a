"""The partitions of DeepSpeed's ZeRO stages 1 and 2: moments, float32 weights and gradients of complete parameters.

Each process holds the complete weights, and of every group of parameters one contiguous part of a flat vector: float32
weights, moments, and at the optimizer's step the gradient averaged over processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fx_influence.core.computed import PartitionedTensors, local_shards
from fx_influence.core.dtensor import before_collective, to_local
from fx_influence.core.tree import dot
from fx_influence.distributed.zero.flat_partition import FlatPartition, Place
from fx_influence.interop.live.guard import CaptureError
from fx_influence.interop.zero.roundings import check_roundings, count_unrounded
from fx_influence.interop.zero.stage3 import gradient_at_step, is_stage3
from fx_influence.types import Gradients, Params


def zero_optimizer(optimizer: Any) -> Any:
    """Return DeepSpeed's optimizer of ZeRO inside any wrappers, None where there is none."""
    while optimizer is not None and not is_zero_optimizer(optimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


LAYOUTS = (
    ("round_robin_bit16_groups", "single_partition_of_fp32_groups"),
    ("bf16_groups", "fp32_groups_flat_partition"),
    ("fp16_groups", "fp32_partitioned_groups_flat"),
)
"""Attributes (0.19.8) that have the forward's weights by group and the partitions of the float32 weights: those of the
optimizer of ZeRO-1 and 2, of ``BF16_Optimizer``, which ZeRO-1 has in bfloat16 with ``grad_accum_dtype`` fp32, and of
stage 3, see ``stage3``."""


def is_zero_optimizer(optimizer: object) -> bool:
    """Return whether an object is DeepSpeed's optimizer of ZeRO-1, 2 or 3, by its partitions and groups of weights."""
    return any(hasattr(optimizer, weights) and hasattr(optimizer, masters) for weights, masters in LAYOUTS)


def forward_weights(optimizer: Any) -> list[list[Tensor]]:
    """Return the parameters by group, in the order of the flat vectors that are partitioned."""
    return next(getattr(optimizer, weights) for weights, _ in LAYOUTS if hasattr(optimizer, weights))


def master_partitions(optimizer: Any) -> list[Tensor]:
    """Return this process's part of each group's float32 weights, which AdamW moves, padded."""
    return next(getattr(optimizer, masters) for _, masters in LAYOUTS if hasattr(optimizer, masters))


def flat_partition(optimizer: Any, names: Mapping[Tensor, str]) -> FlatPartition:
    """Return where each parameter's entries are, of those that the optimizer holds.

    DeepSpeed's mapping on the parameters themselves (0.19.8) is of another order under ``round_robin_gradients``.

    Args:
        optimizer: DeepSpeed's.
        names: of the model's parameters.
    """
    places = {}
    for index, members in enumerate(forward_weights(optimizer)):
        # Older versions and ``BF16_Optimizer`` lay them out without gaps.
        ends = list(itertools.accumulate(p.numel() for p in members))
        offsets = getattr(optimizer, "round_robin_bit16_offsets", {index: [0, *ends[:-1]]})[index]
        for p, offset in zip(members, offsets, strict=True):
            if p in names:
                places[names[p]] = Place(index, int(offset), p.shape)
    parts = master_partitions(optimizer)
    group: Any = optimizer.real_dp_process_group[0] or dist.group.WORLD
    mesh = DeviceMesh.from_group(group, parts[0].device.type)
    return FlatPartition(mesh, [part.numel() for part in parts], places)


def any_on_processes(flags: Sequence[Tensor]) -> list[Tensor]:
    """Return whether each flag is set on any process, by one collective that all of them make."""
    count = torch.stack(list(flags)).to(torch.int32)
    before_collective()
    dist.all_reduce(count)
    return list(count.bool())


def master_weights(optimizer: Any, partition: FlatPartition, parameters: Mapping[str, Tensor]) -> Params:
    """Return the shards of the float32 weights of parameters in half precision, by name; every process calls.

    Args:
        optimizer: DeepSpeed's.
        partition: of its parameters.
        parameters: of the model, by name.

    Raises:
        ValueError: where a parameter is not the rounding of the weights that AdamW moves, on every process.
    """
    shards = partition.shards_of_parts(master_partitions(optimizer))
    differing = [count_unrounded(to_local(partition.shard(x, parameters[x])), to_local(shards[x])) for x in shards]
    check_roundings(differing)
    return {name: x for name, x in shards.items() if parameters[name].dtype != x.dtype}


class PlannedStep(NamedTuple):
    """The gradient of a step that DeepSpeed is about to make, before it is clipped.

    Attributes:
        gradient: by name, averaged over processes: ``PartitionedTensors``, or under stage 3 flat DTensors.
        clip: the factor by which DeepSpeed will multiply it.
        max_grad_norm: the norm to which it clips; None where it does not.
    """

    gradient: Gradients
    clip: float
    max_grad_norm: float | None


def planned_step(optimizer: Any, model: nn.Module) -> PlannedStep:
    """Return the step that DeepSpeed is about to make; every process makes the call.

    A trained parameter that the optimizer does not hold has None; one that no backward pass reached has 0, as its step
    has.

    Args:
        optimizer: DeepSpeed's, with the gradient of all backward passes.
        model: the policy.

    Raises:
        CaptureError: where the optimizer has no gradient, before its last backward pass or after its step.
    """
    if not _has_gradient(optimizer):
        raise CaptureError(
            "DeepSpeed holds no gradient at its optimizer's step; expected that of the step's backward passes. "
            "Call engine.step() once after them"
        )
    gradient = gradient_at_step(optimizer, model) if is_stage3(optimizer) else _partitioned_gradient(optimizer, model)
    max_norm = float(optimizer.clip_grad) or None
    if max_norm is None:
        return PlannedStep(gradient, 1.0, None)
    reached = {name: g for name, g in local_shards(gradient).items() if g is not None}
    return PlannedStep(gradient, min(1.0, max_norm / (float(dot(reached, reached).sqrt()) + 1e-6)), max_norm)


def _partitioned_gradient(optimizer: Any, model: nn.Module) -> Gradients:
    """Return the gradient of complete parameters by name, whose shards are in the partitions of all processes."""
    named = dict(model.named_parameters())
    partition = flat_partition(optimizer, {p: name for name, p in named.items()})
    shards = partition.shards_of_parts(_gradient_partitions(optimizer))
    trained = {name: shards.get(name) for name, p in named.items() if p.requires_grad}
    return cast(Gradients, PartitionedTensors(trained, partition))


def _gradient_partitions(optimizer: Any) -> list[Tensor]:
    """Return this process's part of each group's gradient, flat and padded as the group's weights are."""
    if hasattr(optimizer, "averaged_gradients"):
        groups = range(len(forward_weights(optimizer)))
        return [_flat(optimizer.averaged_gradients[index]) for index in groups]
    return list(optimizer.fp32_groups_gradient_flat_partition)


def _has_gradient(optimizer: Any) -> bool:
    """Return whether an optimizer has the gradient of backward passes."""
    if hasattr(optimizer, "averaged_gradients"):
        groups = range(len(forward_weights(optimizer)))
        return all(optimizer.averaged_gradients.get(index) is not None for index in groups)
    return any(map(any, optimizer.fp32_groups_has_gradients))


def _flat(parts: Any) -> Tensor:
    """Return the flat vector of a group's tensors, which DeepSpeed may have beside them."""
    flat = getattr(parts, "flat_partition", None)
    return torch.cat([part.reshape(-1) for part in parts]) if flat is None else cast(Tensor, flat).view(-1)
