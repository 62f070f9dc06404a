"""``adamw_state`` reads what the next step of a real optimizer would use, and changes nothing."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from helpers.small_optimizers import make_net, make_stepped, make_steps, wrap_by_accelerate
from torch import nn

from fx_influence.interop.optimizers import adamw_state
from fx_influence.types import AdamWHyper


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(ids)))


def one_group_per_layer(model: nn.Sequential, *rates: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [{"params": layer.parameters(), "lr": rate} for layer, rate in zip(model, rates, strict=True)]
    )


def test_adamw_state_values_match_optimizer_by_name() -> None:
    model, optimizer = make_stepped(lr=0.1)
    state = adamw_state(optimizer, model)
    assert list(state.exp_avg) == list(state.exp_avg_sq) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert torch.equal(state.exp_avg[name], optimizer.state[parameter]["exp_avg"])
        assert torch.equal(state.exp_avg_sq[name], optimizer.state[parameter]["exp_avg_sq"])
    assert set(state.step.values()) == {2}
    assert state.max_exp_avg_sq == {}
    assert state.lr == 0.1


def test_adamw_state_copies_moments() -> None:
    model, optimizer = make_stepped()
    state = adamw_state(optimizer, model)
    before = copy.deepcopy(state)
    make_steps(model, optimizer)
    assert all(torch.equal(state.exp_avg[name], before.exp_avg[name]) for name in before.exp_avg)
    assert all(torch.equal(state.exp_avg_sq[name], before.exp_avg_sq[name]) for name in before.exp_avg_sq)
    assert not torch.equal(adamw_state(optimizer, model).exp_avg["0.weight"], before.exp_avg["0.weight"])


def test_adamw_state_aliases_moments_when_not_copied() -> None:
    """The moments with ``copy=False`` are the optimizer's tensors, so its next step changes them."""
    model, optimizer = make_stepped(amsgrad=True)
    state = adamw_state(optimizer, model, copy=False)
    before = copy.deepcopy(state)
    make_steps(model, optimizer, 1)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        for name, parameter in model.named_parameters():
            live = optimizer.state[parameter][key]
            assert getattr(state, key)[name].data_ptr() == live.data_ptr()
            assert not torch.equal(live, getattr(before, key)[name])


def test_adamw_state_converts_narrow_moments_when_not_copied() -> None:
    model = make_net().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    make_steps(model, optimizer)
    copied, aliased = (adamw_state(optimizer, model, copy=copy) for copy in (True, False))
    for name in copied.exp_avg:
        assert aliased.exp_avg[name].dtype == torch.float32
        assert torch.equal(aliased.exp_avg[name], copied.exp_avg[name])


def test_adamw_state_leaves_optimizer_unchanged() -> None:
    model, optimizer = make_stepped(amsgrad=True)
    before = copy.deepcopy(optimizer.state_dict())
    adamw_state(optimizer, model)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, entry in before["state"].items():
        assert all(torch.equal(entry[key], after["state"][index][key]) for key in entry)


def test_adamw_state_is_zero_before_first_step() -> None:
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    state = adamw_state(optimizer, model)
    assert len(optimizer.state) == 0
    for values in (state.exp_avg, state.exp_avg_sq, state.max_exp_avg_sq):
        for name, parameter in model.named_parameters():
            assert torch.equal(values[name], torch.zeros(parameter.shape))
            assert not values[name].requires_grad
    assert set(state.step.values()) == {0}


def test_adamw_state_is_zero_for_unstepped_parameter() -> None:
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters())
    weight = model.get_parameter("0.weight")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = adamw_state(optimizer, model)
    assert state.step == {"0.weight": 1, "0.bias": 0, "1.weight": 0, "1.bias": 0}
    assert state.exp_avg["0.weight"].abs().min() > 0
    assert state.exp_avg["1.weight"].abs().max() == 0


def test_adamw_state_reads_hyperparameters_of_groups() -> None:
    model = make_net()
    optimizer = one_group_per_layer(model, 0.1, 0.1)
    optimizer.param_groups[1].update(lr=0.3, betas=(0.5, 0.7), eps=1e-3, weight_decay=0.25, amsgrad=True, maximize=True)
    state = adamw_state(optimizer, model)
    first, second = state.hyper["0.weight"], state.hyper["1.bias"]
    assert first == AdamWHyper(lr_scale=1.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2)
    others: dict[str, Any] = {
        "beta1": 0.5,
        "beta2": 0.7,
        "eps": 1e-3,
        "weight_decay": 0.25,
        "amsgrad": True,
        "maximize": True,
    }
    assert second == AdamWHyper(lr_scale=second.lr_scale, **others)
    assert second.lr_scale == pytest.approx(3.0)
    assert set(state.max_exp_avg_sq) == {"1.weight", "1.bias"}
    assert state.lr == 0.1


@pytest.mark.parametrize(
    ("rates", "initial", "lr", "scales"),
    [
        ((0.2, 0.1), None, 0.2, (1.0, 0.5)),
        ((0.0, 0.1), None, 0.1, (0.0, 1.0)),
        ((0.0, 0.0), None, 0.0, (1.0, 1.0)),
        ((0.0, 0.0), (0.4, 0.1), 0.0, (1.0, 0.25)),
        ((0.0, 0.0), (0.0, 0.1), 0.0, (0.0, 1.0)),
        ((0.0, 0.0), (0.0, 0.0), 0.0, (1.0, 1.0)),
        ((0.2, 0.1), (0.1, 0.4), 0.2, (1.0, 0.5)),
    ],
)
def test_lr_scale_is_relative_to_first_nonzero_lr(
    rates: tuple[float, float], initial: tuple[float, float] | None, lr: float, scales: tuple[float, float]
) -> None:
    model = make_net()
    optimizer = one_group_per_layer(model, *rates)
    for group, value in zip(optimizer.param_groups, initial or (), strict=False):
        group["initial_lr"] = value
    state = adamw_state(optimizer, model)
    assert state.lr == lr
    assert (state.hyper["0.weight"].lr_scale, state.hyper["1.weight"].lr_scale) == pytest.approx(scales)


def test_lr_scale_ignores_initial_lr_of_some_groups() -> None:
    model = make_net()
    optimizer = one_group_per_layer(model, 0.0, 0.0)
    optimizer.param_groups[0]["initial_lr"] = 0.4
    assert {hyper.lr_scale for hyper in adamw_state(optimizer, model).hyper.values()} == {1.0}


def test_lr_scale_uses_initial_lr_in_warm_up() -> None:
    model = make_net()
    optimizer = one_group_per_layer(model, 0.1, 0.4)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    state = adamw_state(optimizer, model)
    assert state.lr == 0.0
    assert state.hyper["1.weight"].lr_scale == pytest.approx(4.0)


def test_adamw_state_turns_tensor_hyperparameters_to_floats() -> None:
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25), foreach=False)
    optimizer.param_groups[0]["betas"] = (torch.tensor(0.5), torch.tensor(0.75))
    state = adamw_state(optimizer, model)
    assert state.lr == 0.25
    hyper = dataclasses.astuple(state.hyper["0.weight"])
    assert hyper[1:3] == (0.5, 0.75)
    assert all(isinstance(value, float) for value in (state.lr, *hyper[:5]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [0, 1])
def test_adamw_state_is_at_least_float32(dtype: torch.dtype, steps: int) -> None:
    model = make_net().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    make_steps(model, optimizer, steps)
    state = adamw_state(optimizer, model)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value.dtype for values in state[:2] for value in values.values()} == {wide}


def test_adamw_state_reads_amsgrad_maximum() -> None:
    model, optimizer = make_stepped(amsgrad=True)
    state = adamw_state(optimizer, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(state.max_exp_avg_sq[name], optimizer.state[parameter]["max_exp_avg_sq"])


def test_adamw_state_omits_frozen_and_unheld_parameters() -> None:
    model = make_net()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([*model[0].parameters(), model.get_parameter("1.weight")])
    assert list(adamw_state(optimizer, model).step) == ["0.bias", "1.weight"]


def test_adamw_state_lists_tied_parameter_once() -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    make_steps(model, optimizer)
    state = adamw_state(optimizer, model)
    assert list(state.exp_avg) == ["embed.weight", "body.weight", "body.bias"]
    assert torch.equal(state.exp_avg["embed.weight"], optimizer.state[model.head.weight]["exp_avg"])


def test_adamw_state_unwraps_optimizer() -> None:
    model, optimizer = make_stepped()
    state = adamw_state(wrap_by_accelerate(optimizer), model)
    assert torch.equal(state.exp_avg["0.weight"], optimizer.state[model.get_parameter("0.weight")]["exp_avg"])
