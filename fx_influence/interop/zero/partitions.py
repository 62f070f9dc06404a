"""The partitions of DeepSpeed's ZeRO stages 1 and 2: moments and gradients of complete parameters, one at a time.

Each process holds the complete weights, and of every group of parameters one contiguous part of a flat vector: float32
weights, moments, and at the optimizer's step the gradient averaged over processes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fx_influence.core.dtensor import before_collective
from fx_influence.interop.live.guard import CaptureError
from fx_influence.types import Gradients


def zero_optimizer(optimizer: Any) -> Any:
    """Return DeepSpeed's optimizer of ZeRO-1 or 2 inside any wrappers, None where there is none."""
    while optimizer is not None and not is_partitioned(optimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def is_partitioned(optimizer: object) -> bool:
    """Return whether an object is DeepSpeed's optimizer of ZeRO-1 or 2, by its partitions and groups of weights."""
    return all(hasattr(optimizer, name) for name in ("single_partition_of_fp32_groups", "bit16_groups"))


def all_gather_parameter(parameter: Tensor, partition: Tensor) -> Tensor:
    """Return a parameter's values from the partitions of all processes, each of which makes the call.

    Args:
        parameter: of the model; DeepSpeed has noted on it which of its entries this process holds.
        partition: this process's part of a flat vector over the parameter's group.
    """
    values = local_values(parameter, partition)
    before_collective()
    # Every entry is in one partition, and 0 in the others.
    dist.all_reduce(values, group=getattr(parameter, "_dp_group", None))
    return values


def local_values(parameter: Tensor, partition: Tensor) -> Tensor:
    """Return a parameter's values where this process holds them, else 0; see ``all_gather_parameter``."""
    values = torch.zeros(parameter.shape, dtype=partition.dtype, device=partition.device)
    fragment: Any = getattr(parameter, "_hp_mapping", None)
    if fragment is not None:
        entries, source = fragment.lp_fragment_address, fragment.hp_fragment_address
        local = partition.detach().narrow(0, source.start, source.numel)
        values.view(-1).narrow(0, entries.start, entries.numel).copy_(local)
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
    groups = list(zip(optimizer.bit16_groups, _gradient_partitions(optimizer), strict=True))
    by_parameter = {p: all_gather_parameter(p, partition) for members, partition in groups for p in members}
    gradient = {name: by_parameter.get(p) for name, p in model.named_parameters() if p.requires_grad}
    max_norm = float(optimizer.clip_grad) or None
    if max_norm is None:
        return PlannedStep(gradient, 1.0, None)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in by_parameter.values()]
    return PlannedStep(gradient, min(1.0, max_norm / (float(torch.stack(norms).norm()) + 1e-6)), max_norm)


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
