"""Optimizers and states that ``adamw_state`` accepts or refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.small_optimizers import make_net, make_stepped, wrap_by_accelerate
from transformers.optimization import Adafactor

from fx_influence.interop.optimizers import adamw_state

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
    model = make_net()
    for optimizer in (MyAdamW(model.parameters()), torch.optim.Adam(model.parameters(), decoupled_weight_decay=True)):
        assert len(adamw_state(optimizer, model).step) == 4


def test_adamw_state_accepts_groups_without_decoupling_flag() -> None:
    model = make_net()
    optimizer = MyAdamW(model.parameters())
    optimizer.param_groups[0].pop("decoupled_weight_decay", None)
    assert len(adamw_state(optimizer, model).step) == 4


OTHERS = [
    kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "Adam", "AdamW")
]


@pytest.mark.parametrize("kind", [*OTHERS, Adafactor, Lion], ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_adamw_state_refuses_other_optimizers(kind: Callable[..., torch.optim.Optimizer]) -> None:
    model = make_net()
    optimizer = kind([model[0].weight])
    with pytest.raises(TypeError, match=rf"\.{kind.__name__}, whose step is not.*expected torch\.optim\.AdamW"):
        adamw_state(optimizer, model)


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RAdam])
def test_adamw_state_refuses_decoupled_nadam_and_radam(kind: Any) -> None:
    model = make_net()
    with pytest.raises(TypeError, match=rf"{kind.__name__}, whose step is not"):
        adamw_state(kind(model.parameters(), decoupled_weight_decay=True), model)


def test_adamw_state_names_wrapped_foreign_optimizer() -> None:
    model = make_net()
    with pytest.raises(TypeError, match=r"SGD, whose step is not.*expected torch\.optim\.AdamW"):
        adamw_state(wrap_by_accelerate(torch.optim.SGD(model.parameters(), lr=0.1)), model)


def test_adamw_state_refuses_adam_with_l2_decay() -> None:
    model = make_net()
    with pytest.raises(TypeError, match=r"Adam with decoupled_weight_decay=False.*expected torch\.optim\.AdamW"):
        adamw_state(torch.optim.Adam(model.parameters(), weight_decay=0.1), model)


@ADAM_DECOUPLES
def test_adamw_state_refuses_one_group_with_l2_decay() -> None:
    model = make_net()
    optimizer = torch.optim.Adam([{"params": layer.parameters()} for layer in model], decoupled_weight_decay=True)
    optimizer.param_groups[1] |= {"decoupled_weight_decay": False, "weight_decay": 0.1}
    with pytest.raises(TypeError, match=r"decoupled_weight_decay=False in param_groups\[1\]"):
        adamw_state(optimizer, model)


def test_adamw_state_refuses_state_of_another_model() -> None:
    _, optimizer = make_stepped()
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]\['params'\]\[0\].*expected those of model.named_parameters"
    ):
        adamw_state(optimizer, make_net())


def test_adamw_state_names_both_shapes_when_they_differ() -> None:
    model, optimizer = make_stepped()
    optimizer.state[model.get_parameter("1.weight")]["exp_avg_sq"] = torch.zeros(4, 2)
    with pytest.raises(
        ValueError, match=r"exp_avg_sq of 1\.weight has shape \(4, 2\); expected the parameter's, \(2, 4\)"
    ):
        adamw_state(optimizer, model)


@pytest.mark.parametrize(
    ("key", "value"),
    [("exp_avg", float("nan")), ("exp_avg", float("inf")), ("exp_avg_sq", float("nan")), ("exp_avg_sq", -1.0)],
)
def test_adamw_state_refuses_impossible_moments(key: str, value: float) -> None:
    model, optimizer = make_stepped()
    optimizer.state[model.get_parameter("1.bias")][key][1] = value
    with pytest.raises(ValueError, match=rf"{key} of 1\.bias holds {value} \(1 such values\).*earlier checkpoint"):
        adamw_state(optimizer, model)


def test_adamw_state_refuses_missing_moment() -> None:
    model, optimizer = make_stepped()
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match=r"of 0\.weight has no 'max_exp_avg_sq'"):
        adamw_state(optimizer, model)


@pytest.mark.parametrize("step", [torch.tensor(-1.0), 1.5, float("nan")])
def test_adamw_state_refuses_invalid_step(step: Any) -> None:
    model, optimizer = make_stepped()
    optimizer.state[model.get_parameter("0.bias")]["step"] = step
    with pytest.raises(ValueError, match=r"step of 0\.bias is"):
        adamw_state(optimizer, model)


@pytest.mark.parametrize("field", ["lr", "eps", "weight_decay", "betas", "initial_lr"])
def test_adamw_state_refuses_non_finite_hyperparameter(field: str) -> None:
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    optimizer.param_groups[0][field] = (0.9, float("nan")) if field == "betas" else float("nan")
    with pytest.raises(ValueError, match=rf"{field}.* is nan"):
        adamw_state(optimizer, model)


def test_adamw_state_refuses_only_frozen_parameters() -> None:
    model, optimizer = make_stepped()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable parameter.*is_trainable=True"):
        adamw_state(optimizer, model)
