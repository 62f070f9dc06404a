"""The partitions of DeepSpeed's ZeRO stages 1 and 2: moments and gradients of complete parameters, one at a time.

Each process holds the complete weights, and of every group of parameters one contiguous part of a flat vector: float32
weights, moments, and at the optimizer's step the gradient averaged over processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fx_influence.core.dtensor import before_collective
from fx_influence.interop.live.guard import CaptureError


def zero_optimizer(optimizer: Any) -> Any:
    """Return DeepSpeed's optimizer of ZeRO-1 or 2 inside any wrappers, None where there is none."""
    while optimizer is not None and not is_partitioned(optimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def is_partitioned(optimizer: object) -> bool:
    """Return whether an object is DeepSpeed's optimizer of ZeRO-1 or 2, by its partitions and groups of weights."""
    return all(hasattr(optimizer, name) for name in ("single_partition_of_fp32_groups", "bit16_groups"))


def all_gather_parameter(parameter: nn.Parameter, partition: Tensor) -> Tensor:
    """Return a parameter's values from the partitions of all processes, each of which makes the call.

    Args:
        parameter: of the model; DeepSpeed has noted on it which of its entries this process holds.
        partition: this process's part of a flat vector over the parameter's group.
    """
    values = torch.zeros(parameter.numel(), dtype=partition.dtype, device=partition.device)
    fragment: Any = getattr(parameter, "_hp_mapping", None)
    if fragment is not None:
        into, source = fragment.lp_fragment_address, fragment.hp_fragment_address
        values[into.start : into.start + into.numel] = partition.detach()[source.start : source.start + source.numel]
    before_collective()
    # Every entry is in one partition and 0 in the others.
    dist.all_reduce(values, group=getattr(parameter, "_dp_group", None))
    return values.view_as(parameter)


def gathered_gradient(optimizer: Any, model: nn.Module) -> dict[str, Tensor | None]:
    """Return the gradient that DeepSpeed has averaged over processes and not yet clipped, by name, on every process.

    A trained parameter that the optimizer does not hold has None; one that no backward pass reached has 0, as its step
    has.

    Args:
        optimizer: DeepSpeed's, about to step.
        model: the policy.

    Raises:
        CaptureError: where the optimizer has no gradient, before its last backward pass or after its step.
    """
    groups = list(zip(optimizer.bit16_groups, _gradient_partitions(optimizer), strict=True))
    by_parameter = {p: all_gather_parameter(p, partition) for members, partition in groups for p in members}
    return {name: by_parameter.get(p) for name, p in model.named_parameters() if p.requires_grad}


def _gradient_partitions(optimizer: Any) -> list[Tensor]:
    """Return this process's part of each group's gradient, flat and padded as the group's weights are."""
    partitions = []
    for index in range(len(optimizer.bit16_groups)):
        parts = optimizer.averaged_gradients.get(index)
        if parts is None:
            raise CaptureError(
                "DeepSpeed holds no gradient at its optimizer's step; expected that of the step's backward passes. "
                "Call engine.step() once after them"
            )
        flat = getattr(parts, "flat_partition", None)
        partitions.append(torch.cat([part.reshape(-1) for part in parts]) if flat is None else flat.view(-1))
    return partitions
