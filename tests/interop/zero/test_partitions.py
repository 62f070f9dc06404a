"""Moments and gradients are read from DeepSpeed's partitions as torch's AdamW has them for each parameter."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, make_apply, random_batch
from helpers.partitioned_states import recorded_collectives
from torch import Tensor, nn

import fx_influence as fx
from fx_influence.estimators.stderr import MAX_RANDOM_GROUPS
from fx_influence.interop.live.guard import CaptureError
from fx_influence.interop.zero.partitions import planned_step

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
    flat = nn.Parameter(flattened([p.detach().float() for p in members]))
    return SimpleNamespace(
        optimizer=torch.optim.AdamW([flat], lr=0.1, weight_decay=0.2),
        round_robin_bit16_groups=[members],
        single_partition_of_fp32_groups=[flat],
        real_dp_process_group=[None],
        averaged_gradients={},
        clip_grad=clip_grad,
    )


def as_bf16_optimizer(zero: Any, reached: bool = True) -> Any:
    """Return the same stand-in as DeepSpeed's ``BF16_Optimizer``, whose gradients are ``zero.averaged_gradients``.

    Args:
        zero: stand-in of the optimizer of ZeRO-1 and 2.
        reached: whether a backward pass has reached any parameter.
    """
    [flat] = zero.single_partition_of_fp32_groups
    grads = zero.averaged_gradients.get(0)
    return SimpleNamespace(
        optimizer=zero.optimizer,
        bf16_groups=zero.round_robin_bit16_groups,
        fp32_groups_flat_partition=[flat],
        fp32_groups_gradient_flat_partition=[torch.zeros_like(flat) if grads is None else flattened(grads[:-1])],
        fp32_groups_has_gradients=[[reached, False]],
        real_dp_process_group=[None],
        clip_grad=zero.clip_grad,
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
def test_copied_adamw_state_is_gathered_by_flat_vectors() -> None:
    model, zero, _ = stepped_pair()
    with recorded_collectives() as collectives:
        state = fx.adamw_state(zero, model)
    entries = sum(p.numel() for p in model.parameters()) + PADDING
    vectors = [x.size // 4 for x in collectives if x.name != "allreduce"]
    assert vectors == [entries, entries], collectives
    state.exp_avg["bias"].zero_()
    assert fx.adamw_state(zero, model).exp_avg["bias"].any()


def bfloat16_pair() -> tuple[nn.Module, Any, dict[str, Tensor]]:
    """Return a model in bfloat16, its partitioned optimizer, and the float32 weights by name, which it rounds."""
    torch.manual_seed(1)
    masters = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    model = nn.Linear(3, 2).bfloat16()
    model.load_state_dict(masters)
    zero = partitioned(model, [1, 0])
    with torch.no_grad():
        zero.single_partition_of_fp32_groups[0].copy_(flattened([masters["bias"], masters["weight"]]))
    return model, zero, masters


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("kind", [lambda zero: zero, as_bf16_optimizer], ids=["ZeRO-1 and 2", "BF16_Optimizer"])
def test_adamw_state_has_master_weights_in_bfloat16(kind: Any, copied: bool) -> None:
    model, zero, masters = bfloat16_pair()
    state: Any = fx.adamw_state(kind(zero), model, copy=copied)
    assert set(state.master_weights) == set(masters)
    assert all(torch.equal(state.master_weights[name], x) for name, x in masters.items())
    assert all(x.dtype == torch.float32 for x in state.exp_avg.values())
    model, zero, _ = stepped_pair()
    assert fx.adamw_state(kind(zero), model).master_weights is None


@pytest.mark.usefixtures("process_group")
def test_adamw_state_refuses_weights_that_are_not_rounded() -> None:
    model, zero, _ = bfloat16_pair()
    with torch.no_grad():
        model.weight[0, :2] += 1  # type: ignore[index,operator]
    with pytest.raises(ValueError, match=r"2 of the model's weights are not those .*refresh_fp32_params\(\)"):
        fx.adamw_state(zero, model)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", [lambda zero: zero, as_bf16_optimizer], ids=["ZeRO-1 and 2", "BF16_Optimizer"])
@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_planned_step_is_the_unclipped_gradient(max_norm: float, kind: Any) -> None:
    model, _, _ = stepped_pair()
    zero = partitioned(model, [1, 0], max_norm)
    grads = [p.grad for p in zero.round_robin_bit16_groups[0]]
    zero.averaged_gradients[0] = [*grads, torch.zeros(PADDING)]
    planned = planned_step(kind(zero), model)
    assert all(torch.equal(planned.gradient[name], p.grad) for name, p in model.named_parameters())  # type: ignore
    clipped = copy.deepcopy(model)
    for p, q in zip(clipped.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()  # type: ignore[union-attr]  # after a backward pass
    norm = torch.nn.utils.clip_grad_norm_(clipped.parameters(), max_norm or float("inf"))
    assert planned.max_grad_norm == (max_norm or None)
    assert planned.clip == pytest.approx(min(1.0, max_norm / (float(norm) + 1e-6)) if max_norm else 1.0, rel=1e-6)


def test_planned_step_refuses_without_gradient() -> None:
    model = nn.Linear(3, 2)
    zero = partitioned(model, [0, 1])
    for optimizer in (zero, as_bf16_optimizer(zero, reached=False)):
        with pytest.raises(CaptureError, match="DeepSpeed holds no gradient at its optimizer's step"):
            planned_step(optimizer, model)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", [lambda zero: zero, as_bf16_optimizer], ids=["ZeRO-1 and 2", "BF16_Optimizer"])
def test_influence_gathers_directions_alone(kind: Any) -> None:
    """Moments and gradient stay where they are, and no collective is made for each parameter."""
    prompts, counts = 9, list[int]()
    batch = random_batch(torch.Generator().manual_seed(0), prompts, 12, 7, groups=prompts)
    for layers in (1, 3):
        model = TinyPolicy(layers=layers).float()
        apply, params = make_apply(model)
        zero = partitioned(model, list(reversed(range(len(params)))), clip_grad=0.5)
        [flat], [members] = zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups
        flat.grad = torch.randn_like(flat)
        zero.optimizer.step()
        with torch.no_grad():
            flat.copy_(flattened(members))
        zero.averaged_gradients[0] = [*map(torch.randn_like, members), torch.zeros(PADDING)]
        with recorded_collectives() as records:
            planned = planned_step(kind(zero), model)
            state: Any = fx.adamw_state(kind(zero), model, copy=False)
            options: dict[str, Any] = {"grad": planned.gradient, "max_grad_norm": planned.max_grad_norm}
            fx.influence(params, batch, None, state, apply=apply, **options)
        gathered = [record.size for record in records if "gather" in record.name]
        # gamma * grad H of each fold, and of them all on coordinates of fresh denominators
        assert gathered == [flat.nbytes] * (MAX_RANDOM_GROUPS + 1)
        # inner products with the step and its terms, of each parameter and fold
        scalars = 4 * 8 * MAX_RANDOM_GROUPS * len(params)
        assert all(record.size <= scalars for record in records if record.name == "allreduce")
        counts.append(len(records))
    assert counts[0] == counts[1]
