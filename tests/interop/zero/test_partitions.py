"""Moments and gradients are read from DeepSpeed's partitions as torch's AdamW has them for each parameter."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_influence as fx
from fx_influence.interop.live.guard import CaptureError
from fx_influence.interop.zero.partitions import PartitionedParameter, local_values, planned_step

PADDING = 3


def partitioned(model: nn.Module, order: list[int], clip_grad: float = 0.0) -> Any:
    """Return a stand-in for DeepSpeed's optimizer in one process, after its attributes of 0.19.8.

    Args:
        model: its policy; the flat vector has its parameters in another order, and padding.
        order: of the parameters.
        clip_grad: the norm to which gradients are clipped.
    """
    parameters = list(model.parameters())
    members = [parameters[k] for k in order]
    flat = nn.Parameter(flattened([p.detach() for p in members]))
    return SimpleNamespace(
        optimizer=torch.optim.AdamW([flat], lr=0.1, weight_decay=0.2),
        bit16_groups=[parameters],
        round_robin_bit16_groups=[members],
        single_partition_of_fp32_groups=[flat],
        real_dp_process_group=[None],
        averaged_gradients={},
        clip_grad=clip_grad,
    )


def flattened(tensors: list[Tensor]) -> Tensor:
    return torch.cat([*(x.reshape(-1) for x in tensors), torch.zeros(PADDING)])


def stepped_pair() -> tuple[nn.Module, Any, torch.optim.AdamW]:
    """Return a model with a gradient, its partitioned optimizer and torch's AdamW, both after one equal step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer, zero = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.2), partitioned(model, [1, 0])
    model(torch.randn(4, 3)).square().sum().backward()
    [flat] = zero.single_partition_of_fp32_groups
    flat.grad = flattened([p.grad for p in zero.round_robin_bit16_groups[0]])
    zero.optimizer.step()
    optimizer.step()
    return model, zero, optimizer


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("copied", [True, False])
def test_adamw_state_reads_partitions_as_parameters(copied: bool) -> None:
    model, zero, optimizer = stepped_pair()
    wrapper = SimpleNamespace(optimizer=zero)
    actual: Any = fx.adamw_state(wrapper, model, copy=copied)  # type: ignore[arg-type]  # as accelerate wraps it
    expected = fx.adamw_state(optimizer, model)
    for key in ("exp_avg", "exp_avg_sq"):
        assert set(getattr(actual, key)) == {"weight", "bias"}
        for name, value in getattr(expected, key).items():
            assert torch.equal(getattr(actual, key)[name], value)
    assert (actual.step, actual.hyper, actual.lr) == (expected.step, expected.hyper, expected.lr)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_planned_step_is_the_unclipped_gradient(max_norm: float) -> None:
    model, _, _ = stepped_pair()
    zero = partitioned(model, [1, 0], max_norm)
    grads = [p.grad for p in zero.round_robin_bit16_groups[0]]
    zero.averaged_gradients[0] = [*grads, torch.zeros(PADDING)]
    planned = planned_step(zero, model)
    assert all(torch.equal(planned.gradient[name], p.grad) for name, p in model.named_parameters())  # type: ignore
    clipped = copy.deepcopy(model)
    for p, q in zip(clipped.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()  # type: ignore[union-attr]  # after a backward pass
    norm = torch.nn.utils.clip_grad_norm_(clipped.parameters(), max_norm or float("inf"))
    assert planned.max_grad_norm == (max_norm or None)
    assert planned.clip == pytest.approx(min(1.0, max_norm / (float(norm) + 1e-6)) if max_norm else 1.0, rel=1e-6)


def test_planned_step_refuses_without_gradient() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(CaptureError, match="DeepSpeed holds no gradient at its optimizer's step"):
        planned_step(partitioned(model, [0, 1]), model)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_local_values_of_all_processes_add_up(processes: int) -> None:
    """A partition may begin or end within a parameter, hold none of it, or be padding alone."""
    parameters = [torch.empty(shape) for shape in ((2, 3), (1,), (4, 2), (3,))]
    size = -(-(sum(p.numel() for p in parameters) + PADDING) // processes)
    flat, start = torch.arange(1.0, size * processes + 1), 0
    for parameter in parameters:
        parts = [
            local_values(PartitionedParameter(parameter, start - rank * size, None), partition)
            for rank, partition in enumerate(flat.split(size))
        ]
        expected = flat[start : start + parameter.numel()].view_as(parameter)
        assert torch.equal(torch.stack(parts).sum(0), expected)
        start += parameter.numel()
