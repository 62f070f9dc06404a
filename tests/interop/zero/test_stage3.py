"""Moments and gradients are read from ZeRO-3's chunks as torch's AdamW has them for each parameter."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.sharded_models import partition_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fx_influence as fx
from fx_influence.core.dtensor import to_local
from fx_influence.interop.live.guard import CaptureError
from fx_influence.interop.zero.partitions import planned_step
from fx_influence.interop.zero.settings import check_partitions

pytestmark = pytest.mark.usefixtures("process_group")

RATES = [0.1, 0.05]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))


def grouped(model: nn.Sequential) -> list[list[Any]]:
    """Return the parameters by group of the optimizer, in another order than the model's."""
    first, second = model
    return [[first.bias, second.weight, first.weight], [second.bias]]


def partitioned(model: nn.Sequential, clip_grad: float = 0.0) -> Any:
    """Return a stand-in for DeepSpeed's optimizer of a partitioned model, after its attributes of 0.19.8.

    The first group has two sub-groups.
    """
    group, last = grouped(model)
    sub_groups = [group[:2], group[2:], last]
    flats = [nn.Parameter(torch.cat([p.ds_tensor for p in members])) for members in sub_groups]
    adamw = torch.optim.AdamW(
        [{"params": part, "lr": lr} for part, lr in zip((flats[:2], flats[2:]), RATES, strict=True)], weight_decay=0.2
    )
    positions: dict[int, list[int]] = {}
    for index, members in enumerate(sub_groups):
        ends = itertools.accumulate(len(p.ds_tensor) for p in members)
        positions |= {
            id(p): [index, end - len(p.ds_tensor), len(p.ds_tensor)] for p, end in zip(members, ends, strict=True)
        }
    return SimpleNamespace(
        optimizer=adamw,
        module=model,
        fp16_groups=sub_groups,
        fp32_partitioned_groups_flat=flats,
        grad_position=positions,
        get_param_id=id,
        sub_group_to_group_id={0: 0, 1: 0, 2: 1},
        averaged_gradients={},
        clip_grad=clip_grad,
        zero_hpz_partition_size=1,
        parameter_offload=SimpleNamespace(zero_quantized_weights=False, zero_quantized_nontrainable_weights=False),
    )


def stepped_pair(clip_grad: float = 0.0) -> tuple[nn.Sequential, torch.optim.AdamW, nn.Sequential, Any]:
    """Return model and AdamW after a step, with its gradient, and the same under ZeRO-3 with the gradient averaged."""
    model, sharded = make_model(), make_model()
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": lr} for group, lr in zip(grouped(model), RATES, strict=True)], weight_decay=0.2
    )
    model(torch.randn(4, 3)).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    names = {p: name for name, p in sharded.named_parameters()}
    partition_model(sharded, init_device_mesh("cpu", (1,)))
    zero = partitioned(sharded, clip_grad)
    for index, members in enumerate(zero.fp16_groups):
        chunks = [gradients[names[p]].flatten() for p in members]  # type: ignore[union-attr]  # after a backward pass
        zero.averaged_gradients[index] = chunks
        zero.fp32_partitioned_groups_flat[index].grad = torch.cat(chunks)
    zero.optimizer.step()
    for index, members in enumerate(zero.fp16_groups):
        flat = zero.fp32_partitioned_groups_flat[index].detach()
        for p, part in zip(members, flat.split([len(p.ds_tensor) for p in members]), strict=True):
            p.ds_tensor.copy_(part)
    for group in zero.optimizer.param_groups:
        group["params"] = []
    optimizer.step()
    return model, optimizer, sharded, zero


def values(tree: dict[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
    return {name: to_local(tree[name]).view(p.shape) for name, p in like.named_parameters()}


@pytest.mark.parametrize("copied", [True, False])
def test_adamw_state_reads_chunks_as_parameters(copied: bool) -> None:
    model, optimizer, sharded, zero = stepped_pair()
    wrapper = SimpleNamespace(optimizer=zero)
    actual: Any = fx.adamw_state(wrapper, sharded, copy=copied)  # type: ignore[arg-type]  # as accelerate wraps it
    expected = fx.adamw_state(optimizer, model)
    for key in ("exp_avg", "exp_avg_sq"):
        read = values(getattr(actual, key), model)
        assert all(torch.equal(read[name], x) for name, x in getattr(expected, key).items())
    assert (actual.step, actual.hyper, actual.lr) == (expected.step, expected.hyper, expected.lr)


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_planned_step_is_the_unclipped_gradient(max_norm: float) -> None:
    model, _, sharded, zero = stepped_pair(max_norm)
    planned = planned_step(zero, sharded)
    gradient = values(planned.gradient, model)  # type: ignore[arg-type]  # none is None
    assert all(torch.equal(gradient[name], p.grad) for name, p in model.named_parameters())  # type: ignore[arg-type]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
    assert planned.max_grad_norm == (max_norm or None)
    assert planned.clip == pytest.approx(min(1.0, max_norm / (float(norm) + 1e-6)) if max_norm else 1.0, rel=1e-6)


def test_planned_step_refuses_without_gradient() -> None:
    _, _, sharded, zero = stepped_pair()
    # As after the step.
    zero.averaged_gradients[1] = None
    with pytest.raises(CaptureError, match="DeepSpeed holds no gradient at its optimizer's step"):
        planned_step(zero, sharded)


def bfloat16_pair() -> tuple[nn.Sequential, Any, dict[str, Tensor]]:
    """Return a model in bfloat16 under ZeRO-3, its optimizer, and the float32 weights by name, which it rounds."""
    model = make_model()
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {p: name for name, p in model.bfloat16().named_parameters()}
    partition_model(model, init_device_mesh("cpu", (1,)))
    zero = partitioned(model)
    for index, members in enumerate(zero.fp16_groups):
        flat = torch.cat([masters[names[p]].flatten() for p in members])
        zero.fp32_partitioned_groups_flat[index].data = flat
    return model, zero, masters


@pytest.mark.parametrize("copied", [True, False])
def test_adamw_state_has_master_weights_in_bfloat16(copied: bool) -> None:
    model, zero, masters = bfloat16_pair()
    check_partitions(zero)
    state: Any = fx.adamw_state(zero, model, copy=copied)
    read = values(state.master_weights, make_model())
    assert read.keys() == masters.keys()
    assert all(torch.equal(read[name], x) for name, x in masters.items())
    assert all(x.dtype == torch.float32 for x in state.exp_avg.values())
    zero.fp32_partitioned_groups_flat[0].detach().zero_()
    assert torch.equal(to_local(state.master_weights["0.bias"]), copied * masters["0.bias"])
    _, _, sharded, zero = stepped_pair()
    assert fx.adamw_state(zero, sharded).master_weights is None


def test_adamw_state_refuses_weights_that_are_not_rounded() -> None:
    model, zero, _ = bfloat16_pair()
    zero.fp16_groups[1][0].ds_tensor[:2] += 1
    with pytest.raises(ValueError, match=r"2 of the model's weights are not those .*refresh_fp32_params\(\)"):
        fx.adamw_state(zero, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_hpz_partition_size": 2}, "over groups of the 1 processes; .*Leave zero_hpz_partition_size"),
        (
            {"parameter_offload": SimpleNamespace(zero_quantized_weights=True)},
            "quantises the weights that it gathers; .*Leave zero_quantized_weights",
        ),
    ],
)
def test_check_partitions_names_other_chunks(change: dict[str, Any], message: str) -> None:
    zero = stepped_pair()[3]
    check_partitions(zero)
    vars(zero).update(change)
    with pytest.raises(ValueError, match=message):
        check_partitions(zero)
