"""The partitions of DeepSpeed's ZeRO stages 1 and 2: moments and gradients of complete parameters, one at a time.

Each process holds the complete weights, and of every group of parameters one contiguous part of a flat vector: float32
weights, moments, and at the optimizer's step the gradient averaged over processes.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fx_influence.core.dtensor import before_collective
from fx_influence.core.tree import dot
from fx_influence.interop.live.guard import CaptureError
from fx_influence.interop.zero.stage3 import gradient_at_step, is_stage3
from fx_influence.types import Gradients


def zero_optimizer(optimizer: Any) -> Any:
    """Return DeepSpeed's optimizer of ZeRO inside any wrappers, None where there is none."""
    while optimizer is not None and not is_partitioned(optimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def is_partitioned(optimizer: object) -> bool:
    """Return whether an object is DeepSpeed's optimizer of ZeRO-1, 2 or 3, by its partitions and groups of weights."""
    of_stage_1_or_2 = ("single_partition_of_fp32_groups", "round_robin_bit16_groups")
    return is_stage3(optimizer) or all(hasattr(optimizer, name) for name in of_stage_1_or_2)


class PartitionedParameter(NamedTuple):
    """A parameter, and where this process's partition of its group has its values.

    Attributes:
        parameter: of the model.
        start: index of its first value in this process's partition; negative where an earlier partition has it.
        group: processes that hold the partitions; None for all.
    """

    parameter: Tensor
    start: int
    group: dist.ProcessGroup | None


def partitioned_parameters(optimizer: Any, index: int) -> list[PartitionedParameter]:
    """Return the parameters of a group in the order of the flat vector that is partitioned.

    DeepSpeed's mapping on the parameters themselves (0.19.8) is of another order under ``round_robin_gradients``.

    Args:
        optimizer: DeepSpeed's.
        index: of the group in its ``param_groups``.
    """
    members = optimizer.round_robin_bit16_groups[index]
    # Older versions lay them out without gaps.
    ends = list(itertools.accumulate(p.numel() for p in members))
    offsets = getattr(optimizer, "round_robin_bit16_offsets", {index: [0, *ends[:-1]]})[index]
    group = optimizer.real_dp_process_group[index]
    first = dist.get_rank(group) * optimizer.single_partition_of_fp32_groups[index].numel()
    return [PartitionedParameter(p, int(offset) - first, group) for p, offset in zip(members, offsets, strict=True)]


def all_gather_parameter(partitioned: PartitionedParameter, partition: Tensor) -> Tensor:
    """Return a parameter's values from the partitions of all processes, each of which makes the call.

    Args:
        partitioned: the parameter.
        partition: this process's part of a flat vector over the parameter's group.
    """
    values = local_values(partitioned, partition)
    before_collective()
    # Every entry is in one partition, and 0 in the others.
    dist.all_reduce(values, group=partitioned.group)
    return values


def local_values(partitioned: PartitionedParameter, partition: Tensor) -> Tensor:
    """Return a parameter's values where this process holds them, else 0; see ``all_gather_parameter``.

    Example:
        >>> local_values(PartitionedParameter(torch.empty(2, 2), -1, None), torch.tensor([1.0, 2.0])).tolist()
        [[0.0, 1.0], [2.0, 0.0]]
    """
    parameter, start = partitioned.parameter, partitioned.start
    values = torch.zeros(parameter.shape, dtype=partition.dtype, device=partition.device)
    first, last = max(start, 0), min(start + parameter.numel(), partition.numel())
    if first < last:
        values.view(-1)[first - start : last - start] = partition.detach()[first:last]
    return values


class PlannedStep(NamedTuple):
    """The gradient of a step that DeepSpeed is about to make, before it is clipped.

    Attributes:
        gradient: by name, averaged over processes: the same tensors on each.
        clip: the factor by which DeepSpeed will multiply it.
        max_grad_norm: the norm to which it clips; None where it does not.
    """

    gradient: Gradients
    clip: float
    max_grad_norm: float | None


def planned_step(optimizer: Any, model: nn.Module) -> PlannedStep:
    """Return the step that DeepSpeed is about to make, gathered from all processes, each of which makes the call.

    A trained parameter that the optimizer does not hold has None; one that no backward pass reached has 0, as its step
    has.

    Args:
        optimizer: DeepSpeed's, with the gradient of all backward passes.
        model: the policy.

    Raises:
        CaptureError: where the optimizer has no gradient, before its last backward pass or after its step.
    """
    count = len(optimizer.fp16_groups if is_stage3(optimizer) else optimizer.round_robin_bit16_groups)
    if any(optimizer.averaged_gradients.get(index) is None for index in range(count)):
        raise CaptureError(
            "DeepSpeed holds no gradient at its optimizer's step; expected that of the step's backward passes. "
            "Call engine.step() once after them"
        )
    gradient = gradient_at_step(optimizer, model) if is_stage3(optimizer) else _gathered_gradient(optimizer, model)
    max_norm = float(optimizer.clip_grad) or None
    if max_norm is None:
        return PlannedStep(gradient, 1.0, None)
    reached = {name: g for name, g in gradient.items() if g is not None}
    return PlannedStep(gradient, min(1.0, max_norm / (float(dot(reached, reached).sqrt()) + 1e-6)), max_norm)


def _gathered_gradient(optimizer: Any, model: nn.Module) -> Gradients:
    """Return the gradient of complete parameters by name, gathered from the partitions of all processes."""
    by_parameter = {
        partitioned.parameter: all_gather_parameter(partitioned, partition)
        for index, partition in enumerate(_gradient_partitions(optimizer))
        for partitioned in partitioned_parameters(optimizer, index)
    }
    return {name: by_parameter.get(p) for name, p in model.named_parameters() if p.requires_grad}


def _gradient_partitions(optimizer: Any) -> list[Tensor]:
    """Return this process's part of each group's gradient, flat and padded as the group's weights are."""
    partitions = []
    for index in range(len(optimizer.round_robin_bit16_groups)):
        parts = optimizer.averaged_gradients[index]
        flat = getattr(parts, "flat_partition", None)
        partitions.append(torch.cat([part.reshape(-1) for part in parts]) if flat is None else flat.view(-1))
    return partitions
