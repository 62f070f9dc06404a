"""The partitions of DeepSpeed's ZeRO stages 1 and 2: moments and gradients of complete parameters, one at a time.

Each process holds the complete weights, and of every group of parameters one contiguous part of a flat vector: float32
weights, moments, and at the optimizer's step the gradient averaged over processes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fx_influence.core.dtensor import before_collective
from fx_influence.core.tree import dot
from fx_influence.interop.live.guard import CaptureError
from fx_influence.interop.zero.roundings import check_roundings, count_unrounded
from fx_influence.interop.zero.stage3 import gradient_at_step, is_stage3
from fx_influence.types import Gradients


def zero_optimizer(optimizer: Any) -> Any:
    """Return DeepSpeed's optimizer of ZeRO inside any wrappers, None where there is none."""
    while optimizer is not None and not is_partitioned(optimizer):
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


def is_partitioned(optimizer: object) -> bool:
    """Return whether an object is DeepSpeed's optimizer of ZeRO-1, 2 or 3, by its partitions and groups of weights."""
    return any(hasattr(optimizer, weights) and hasattr(optimizer, masters) for weights, masters in LAYOUTS)


def forward_weights(optimizer: Any) -> list[list[Tensor]]:
    """Return the parameters by group, in the order of the flat vectors that are partitioned."""
    return next(getattr(optimizer, weights) for weights, _ in LAYOUTS if hasattr(optimizer, weights))


def master_partitions(optimizer: Any) -> list[Tensor]:
    """Return this process's part of each group's float32 weights, which AdamW moves, padded."""
    return next(getattr(optimizer, masters) for _, masters in LAYOUTS if hasattr(optimizer, masters))


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
    """Return the parameters of a group, each with its place in the flat vector that is partitioned.

    DeepSpeed's mapping on the parameters themselves (0.19.8) is of another order under ``round_robin_gradients``.

    Args:
        optimizer: DeepSpeed's.
        index: of the group in its ``param_groups``.
    """
    members = forward_weights(optimizer)[index]
    # Older versions and ``BF16_Optimizer`` lay them out without gaps.
    ends = list(itertools.accumulate(p.numel() for p in members))
    offsets = getattr(optimizer, "round_robin_bit16_offsets", {index: [0, *ends[:-1]]})[index]
    group = optimizer.real_dp_process_group[index]
    first = dist.get_rank(group) * master_partitions(optimizer)[index].numel()
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


def any_on_processes(flags: Sequence[Tensor]) -> list[Tensor]:
    """Return whether each flag is set on any process, by one collective that all of them make."""
    count = torch.stack(list(flags)).to(torch.int32)
    before_collective()
    dist.all_reduce(count)
    return list(count.bool())


def _all_gather_group(members: Sequence[PartitionedParameter], partition: Tensor) -> dict[Tensor, Tensor]:
    """Return the values of all parameters of a group, views of one flat vector that takes one collective.

    Args:
        members: the group's parameters.
        partition: this process's part of the vector, as long as that of any other.
    """
    group = members[0].group
    flat = partition.new_empty(dist.get_world_size(group) * partition.numel())
    before_collective()
    dist.all_gather(list(flat.split(partition.numel())), partition.detach(), group=group)
    first = dist.get_rank(group) * partition.numel()
    starts = [first + x.start for x in members]
    return {
        x.parameter: flat[start : start + x.parameter.numel()].view_as(x.parameter)
        for x, start in zip(members, starts, strict=True)
    }


def local_values(partitioned: PartitionedParameter, partition: Tensor) -> Tensor:
    """Return a parameter's values where this process holds them, else 0; see ``all_gather_parameter``.

    Example:
        >>> local_values(PartitionedParameter(torch.empty(2, 2), -1, None), torch.tensor([1.0, 2.0])).tolist()
        [[0.0, 1.0], [2.0, 0.0]]
    """
    values = torch.zeros(partitioned.parameter.shape, dtype=partition.dtype, device=partition.device)
    first, last = local_range(partitioned, partition)
    start = partitioned.start
    values.view(-1)[first - start : last - start] = partition.detach()[first:last]
    return values


def local_range(partitioned: PartitionedParameter, partition: Tensor) -> tuple[int, int]:
    """Return the first index in this process's partition of a parameter's values, and the one after the last.

    Example:
        >>> local_range(PartitionedParameter(torch.empty(2, 2), -1, None), torch.zeros(8))
        (0, 3)
    """
    start = partitioned.start
    first = min(max(start, 0), partition.numel())
    return first, max(first, min(start + partitioned.parameter.numel(), partition.numel()))


def master_weights(optimizer: Any, names: Mapping[Tensor, str]) -> dict[str, Callable[[], Tensor]]:
    """Return functions that gather the float32 weights of parameters in half precision, by name; every process calls.

    Args:
        optimizer: DeepSpeed's.
        names: of the model's parameters.

    Raises:
        ValueError: where a parameter is not the rounding of the weights that AdamW moves, on every process.
    """
    reads: dict[str, Callable[[], Tensor]] = {}
    differing = []
    for index, masters in enumerate(master_partitions(optimizer)):
        for partitioned in partitioned_parameters(optimizer, index):
            (first, last), start = local_range(partitioned, masters), partitioned.start
            weights = partitioned.parameter.view(-1)[first - start : last - start]
            differing.append(count_unrounded(weights, masters[first:last]))
            if partitioned.parameter.dtype != masters.dtype:
                reads[names[partitioned.parameter]] = functools.partial(all_gather_parameter, partitioned, masters)
    check_roundings(differing)
    return reads


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
    if not _has_gradient(optimizer):
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
    by_parameter: dict[Tensor, Tensor] = {}
    for index, partition in enumerate(_gradient_partitions(optimizer)):
        by_parameter |= _all_gather_group(partitioned_parameters(optimizer, index), partition)
    return {name: by_parameter.get(p) for name, p in model.named_parameters() if p.requires_grad}


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
