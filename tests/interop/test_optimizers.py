"""``adamw_state`` reads what the next step of a real optimizer would use, and changes nothing."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers.optimization import Adafactor

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


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 2) -> None:
    for seed in range(times):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def _stepped(**hyper: Any) -> tuple[nn.Sequential, torch.optim.AdamW]:
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters(), **hyper)
    _step(model, optimizer)
    return model, optimizer


def _wrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    wrapper = Accelerator(cpu=True).prepare(optimizer)
    assert not isinstance(wrapper, type(optimizer))
    return wrapper


def _groups(model: nn.Sequential, *rates: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [{"params": layer.parameters(), "lr": rate} for layer, rate in zip(model, rates, strict=True)]
    )


def test_adamw_state_values_match_optimizer_by_name() -> None:
    model, optimizer = _stepped(lr=0.1)
    state = adamw_state(optimizer, model)
    assert list(state.exp_avg) == list(state.exp_avg_sq) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert torch.equal(state.exp_avg[name], optimizer.state[parameter]["exp_avg"])
        assert torch.equal(state.exp_avg_sq[name], optimizer.state[parameter]["exp_avg_sq"])
    assert set(state.step.values()) == {2}
    assert state.max_exp_avg_sq == {}
    assert state.lr == 0.1


def test_adamw_state_copies_moments() -> None:
    model, optimizer = _stepped()
    state = adamw_state(optimizer, model)
    before = copy.deepcopy(state)
    _step(model, optimizer)
    assert all(torch.equal(state.exp_avg[name], before.exp_avg[name]) for name in before.exp_avg)
    assert all(torch.equal(state.exp_avg_sq[name], before.exp_avg_sq[name]) for name in before.exp_avg_sq)
    assert not torch.equal(adamw_state(optimizer, model).exp_avg["0.weight"], before.exp_avg["0.weight"])


def test_adamw_state_aliases_moments_when_not_copied() -> None:
    """With ``copy=False`` the moments are the optimizer's tensors, so its next step changes them."""
    model, optimizer = _stepped(amsgrad=True)
    state = adamw_state(optimizer, model, copy=False)
    before = copy.deepcopy(state)
    _step(model, optimizer, 1)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        for name, parameter in model.named_parameters():
            live = optimizer.state[parameter][key]
            assert getattr(state, key)[name].data_ptr() == live.data_ptr()
            assert not torch.equal(live, getattr(before, key)[name])


def test_adamw_state_converts_narrow_moments_when_not_copied() -> None:
    model = _net().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    _step(model, optimizer)
    copied, aliased = (adamw_state(optimizer, model, copy=copy) for copy in (True, False))
    for name in copied.exp_avg:
        assert aliased.exp_avg[name].dtype == torch.float32
        assert torch.equal(aliased.exp_avg[name], copied.exp_avg[name])


def test_adamw_state_leaves_optimizer_unchanged() -> None:
    model, optimizer = _stepped(amsgrad=True)
    before = copy.deepcopy(optimizer.state_dict())
    adamw_state(optimizer, model)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, entry in before["state"].items():
        assert all(torch.equal(entry[key], after["state"][index][key]) for key in entry)


def test_adamw_state_is_zero_before_first_step() -> None:
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    state = adamw_state(optimizer, model)
    assert len(optimizer.state) == 0
    for values in (state.exp_avg, state.exp_avg_sq, state.max_exp_avg_sq):
        for name, parameter in model.named_parameters():
            assert torch.equal(values[name], torch.zeros(parameter.shape))
            assert not values[name].requires_grad
    assert set(state.step.values()) == {0}


def test_adamw_state_is_zero_for_unstepped_parameter() -> None:
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    state = adamw_state(optimizer, model)
    assert state.step == {"0.weight": 1, "0.bias": 0, "1.weight": 0, "1.bias": 0}
    assert state.exp_avg["0.weight"].abs().min() > 0
    assert state.exp_avg["1.weight"].abs().max() == 0


def test_adamw_state_reads_hyperparameters_of_groups() -> None:
    model = _net()
    optimizer = _groups(model, 0.1, 0.1)
    optimizer.param_groups[1].update(lr=0.3, betas=(0.5, 0.7), eps=1e-3, weight_decay=0.25, amsgrad=True, maximize=True)
    state = adamw_state(optimizer, model)
    first, second = state.hyper["0.weight"], state.hyper["1.bias"]
    assert first == AdamWHyper(lr_scale=1.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2)
    others = {"beta1": 0.5, "beta2": 0.7, "eps": 1e-3, "weight_decay": 0.25, "amsgrad": True, "maximize": True}
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
    model = _net()
    optimizer = _groups(model, *rates)
    for group, value in zip(optimizer.param_groups, initial or (), strict=False):
        group["initial_lr"] = value
    state = adamw_state(optimizer, model)
    assert state.lr == lr
    assert (state.hyper["0.weight"].lr_scale, state.hyper["1.weight"].lr_scale) == pytest.approx(scales)


def test_lr_scale_ignores_initial_lr_of_some_groups() -> None:
    model = _net()
    optimizer = _groups(model, 0.0, 0.0)
    optimizer.param_groups[0]["initial_lr"] = 0.4
    assert {hyper.lr_scale for hyper in adamw_state(optimizer, model).hyper.values()} == {1.0}


def test_lr_scale_uses_initial_lr_in_warm_up() -> None:
    model = _net()
    optimizer = _groups(model, 0.1, 0.4)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    state = adamw_state(optimizer, model)
    assert state.lr == 0.0
    assert state.hyper["1.weight"].lr_scale == pytest.approx(4.0)


def test_adamw_state_turns_tensor_hyperparameters_to_floats() -> None:
    model = _net()
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
    model = _net().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    _step(model, optimizer, steps)
    state = adamw_state(optimizer, model)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value.dtype for values in state[:2] for value in values.values()} == {wide}


def test_adamw_state_reads_amsgrad_maximum() -> None:
    model, optimizer = _stepped(amsgrad=True)
    state = adamw_state(optimizer, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(state.max_exp_avg_sq[name], optimizer.state[parameter]["max_exp_avg_sq"])


def test_adamw_state_omits_frozen_and_unheld_parameters() -> None:
    model = _net()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([*model[0].parameters(), model[1].weight])
    assert list(adamw_state(optimizer, model).step) == ["0.bias", "1.weight"]


def test_adamw_state_lists_tied_parameter_once() -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    _step(model, optimizer)
    state = adamw_state(optimizer, model)
    assert list(state.exp_avg) == ["embed.weight", "body.weight", "body.bias"]
    assert torch.equal(state.exp_avg["embed.weight"], optimizer.state[model.head.weight]["exp_avg"])


def test_adamw_state_unwraps_optimizer() -> None:
    model, optimizer = _stepped()
    state = adamw_state(_wrapped(optimizer), model)
    assert torch.equal(state.exp_avg["0.weight"], optimizer.state[model[0].weight]["exp_avg"])


ADAM_DECOUPLES = pytest.mark.skipif(
    "decoupled_weight_decay" not in torch.optim.Adam([torch.zeros(1)]).defaults, reason="newer torch has the flag"
)


class MyAdamW(torch.optim.AdamW):
    pass


class Lion(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0})


@ADAM_DECOUPLES
def test_adamw_state_accepts_subclasses_and_decoupled_adam() -> None:
    model = _net()
    for optimizer in (MyAdamW(model.parameters()), torch.optim.Adam(model.parameters(), decoupled_weight_decay=True)):
        assert len(adamw_state(optimizer, model).step) == 4


def test_adamw_state_accepts_groups_without_decoupling_flag() -> None:
    model = _net()
    optimizer = MyAdamW(model.parameters())
    optimizer.param_groups[0].pop("decoupled_weight_decay", None)
    assert len(adamw_state(optimizer, model).step) == 4


OTHERS = [
    kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "Adam", "AdamW")
]


@pytest.mark.parametrize("kind", [*OTHERS, Adafactor, Lion], ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_adamw_state_refuses_other_optimizers(kind: type[torch.optim.Optimizer]) -> None:
    model = _net()
    optimizer = kind([model[0].weight])
    with pytest.raises(TypeError, match=rf"\.{kind.__name__}, whose step is not.*supported are torch\.optim\.AdamW"):
        adamw_state(optimizer, model)


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RAdam])
def test_adamw_state_refuses_decoupled_nadam_and_radam(kind: Any) -> None:
    model = _net()
    with pytest.raises(TypeError, match=rf"{kind.__name__}, whose step is not"):
        adamw_state(kind(model.parameters(), decoupled_weight_decay=True), model)


def test_adamw_state_names_wrapped_foreign_optimizer() -> None:
    model = _net()
    with pytest.raises(TypeError, match=r"SGD, whose step is not.*supported are torch\.optim\.AdamW"):
        adamw_state(_wrapped(torch.optim.SGD(model.parameters(), lr=0.1)), model)


def test_adamw_state_refuses_adam_with_l2_decay() -> None:
    model = _net()
    with pytest.raises(TypeError, match=r"Adam with decoupled_weight_decay=False.*supported are torch\.optim\.AdamW"):
        adamw_state(torch.optim.Adam(model.parameters()), model)


@ADAM_DECOUPLES
def test_adamw_state_refuses_one_group_with_l2_decay() -> None:
    model = _net()
    optimizer = torch.optim.Adam([{"params": layer.parameters()} for layer in model], decoupled_weight_decay=True)
    optimizer.param_groups[1]["decoupled_weight_decay"] = False
    with pytest.raises(TypeError, match=r"decoupled_weight_decay=False in param_groups\[1\]"):
        adamw_state(optimizer, model)


def test_adamw_state_refuses_state_of_another_model() -> None:
    _, optimizer = _stepped()
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[0\].*optimizer state of another model"):
        adamw_state(optimizer, _net())


def test_adamw_state_names_both_shapes_when_they_differ() -> None:
    model, optimizer = _stepped()
    optimizer.state[model[1].weight]["exp_avg_sq"] = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"exp_avg_sq of 1\.weight has shape \(4, 2\), the parameter \(2, 4\)"):
        adamw_state(optimizer, model)


@pytest.mark.parametrize(
    ("key", "value"),
    [("exp_avg", float("nan")), ("exp_avg", float("inf")), ("exp_avg_sq", float("nan")), ("exp_avg_sq", -1.0)],
)
def test_adamw_state_refuses_impossible_moments(key: str, value: float) -> None:
    model, optimizer = _stepped()
    optimizer.state[model[1].bias][key][1] = value
    with pytest.raises(ValueError, match=rf"{key} of 1\.bias holds {value} \(1 such values\).*earlier checkpoint"):
        adamw_state(optimizer, model)


def test_adamw_state_refuses_missing_moment() -> None:
    model, optimizer = _stepped()
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match=r"of 0\.weight has no 'max_exp_avg_sq'"):
        adamw_state(optimizer, model)


@pytest.mark.parametrize("step", [torch.tensor(-1.0), 1.5, float("nan")])
def test_adamw_state_refuses_invalid_step(step: Any) -> None:
    model, optimizer = _stepped()
    optimizer.state[model[0].bias]["step"] = step
    with pytest.raises(ValueError, match=r"step of 0\.bias is"):
        adamw_state(optimizer, model)


@pytest.mark.parametrize("field", ["lr", "eps", "weight_decay", "betas", "initial_lr"])
def test_adamw_state_refuses_non_finite_hyperparameter(field: str) -> None:
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    optimizer.param_groups[0][field] = (0.9, float("nan")) if field == "betas" else float("nan")
    with pytest.raises(ValueError, match=rf"{field}.* is nan"):
        adamw_state(optimizer, model)


def test_adamw_state_refuses_only_frozen_parameters() -> None:
    model, optimizer = _stepped()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable parameter.*is_trainable=True"):
        adamw_state(optimizer, model)
