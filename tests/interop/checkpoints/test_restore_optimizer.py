"""``restore_optimizer`` finds the parameter behind every integer id."""

from __future__ import annotations

import pickle
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_models import CONFIGS, LORA, assert_same_state, train
from helpers.scales_model import Scales, shuffled_groups
from helpers.versions import TORCH
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from transformers import (
    AutoModelForCausalLM,
)

from fx_influence.interop.checkpoints.load import restore_optimizer
from fx_influence.interop.optimizers import adamw_state

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",  # peft reads it
)


STORES_NAMES = pytest.mark.skipif(TORCH < (2, 6), reason="an optimizer stores names since torch 2.6")


@pytest.mark.parametrize("kind", ["qwen2", "llama", *LORA])
def test_restore_detects_every_permutation_of_names(kind: str, bases: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(bases / (kind if kind in CONFIGS else "llama"))
    if kind in LORA:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **LORA[kind]))
    trainer = train(model, tmp_path)
    live = adamw_state(trainer.optimizer, model)
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    of = {parameter: name for name, parameter in model.named_parameters()}
    names = [[of[parameter] for parameter in group["params"]] for group in trainer.optimizer.param_groups]
    assert_same_state(adamw_state(restore_optimizer(saved, model), model), live)
    assert_same_state(adamw_state(restore_optimizer(saved, model, names), model), live)
    pairs = [
        pair for group in names for pair in combinations(group, 2) if len({live.exp_avg[n].shape for n in pair}) == 1
    ]
    assert len(pairs) >= 3
    for first, second in pairs:
        swap = {first: second, second: first}
        swapped = restore_optimizer(saved, model, [[swap.get(name, name) for name in group] for group in names])
        state = adamw_state(swapped, model)
        assert torch.equal(state.exp_avg[first], live.exp_avg[second])
        with pytest.raises(AssertionError):
            assert_same_state(state, live)


def test_restore_maps_parameters_of_equal_shape() -> None:
    model = Scales()
    parameters = dict(model.named_parameters())
    groups = [[name for name in parameters if ("bias" in name) == bias] for bias in (False, True)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in group], "weight_decay": decay}
            for group, decay in zip(groups, (0.1, 0.0), strict=True)
        ]
    )
    for index, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full((4,), float(index + 1))
    optimizer.step()
    saved, live = optimizer.state_dict(), adamw_state(optimizer, model)
    # named_parameters() order fits every shape and is wrong
    plain = dict(zip(parameters, (entry["exp_avg"] for entry in saved["state"].values()), strict=True))
    assert all(plain[name].shape == value.shape for name, value in live.exp_avg.items())
    assert sum(not torch.equal(plain[name], value) for name, value in live.exp_avg.items()) == 4
    assert_same_state(adamw_state(restore_optimizer(saved, model), model), live)


def test_restore_maps_any_grouping_by_param_names() -> None:
    model = Scales()
    optimizer, names = shuffled_groups(model, names=False)
    restored = restore_optimizer(optimizer.state_dict(), model, names)
    assert_same_state(adamw_state(restored, model), adamw_state(optimizer, model))


@STORES_NAMES
def test_restore_maps_any_grouping_by_stored_names() -> None:
    model = Scales()
    optimizer, _ = shuffled_groups(model, names=True)
    assert_same_state(
        adamw_state(restore_optimizer(optimizer.state_dict(), model), model), adamw_state(optimizer, model)
    )


@STORES_NAMES
def test_restore_prefers_param_names_to_stored_names() -> None:
    model = Scales()
    optimizer, names = shuffled_groups(model, names=True)
    names[2] = names[2][::-1]
    restored = adamw_state(restore_optimizer(optimizer.state_dict(), model, names), model)
    live = adamw_state(optimizer, model)
    assert torch.equal(restored.exp_avg[names[2][0]], live.exp_avg[names[2][-1]])
    assert not torch.equal(restored.exp_avg[names[2][0]], live.exp_avg[names[2][0]])


@pytest.mark.parametrize("everything", [False, True], ids=["trainable", "all"])
def test_restore_maps_one_group_in_model_order(everything: bool) -> None:
    model = Scales()
    model.layer0.requires_grad_(False)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad or everything)
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full((4,), index + 1.0) if parameter.requires_grad else None
    optimizer.step()
    live = adamw_state(optimizer, model)
    assert list(live.step) == ["layer1.scale", "layer1.bias", "layer2.scale", "layer2.bias"]
    assert_same_state(adamw_state(restore_optimizer(optimizer.state_dict(), model), model), live)


def test_restored_optimizer_makes_same_next_step() -> None:
    model = Scales()
    optimizer, names = shuffled_groups(model, names=False)
    saved, start = optimizer.state_dict(), [p.detach().clone() for p in model.parameters()]
    saved = pickle.loads(pickle.dumps(saved))
    optimizer.step()
    expected = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.copy_(value)
    restored = restore_optimizer(saved, model, names)
    assert type(restored) is torch.optim.AdamW
    restored.step()
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), expected, strict=True))


def test_restore_names_both_counts_when_they_differ() -> None:
    saved = torch.optim.AdamW(list(Scales().parameters())[1:]).state_dict()
    with pytest.raises(ValueError, match=r"groups hold \[5\] parameters; expected \[6\].*param_names="):
        restore_optimizer(saved, Scales())


def test_restore_names_both_shapes_when_they_differ() -> None:
    optimizer, names = shuffled_groups(Scales(), names=False)
    wide = Scales()
    wide.layer1.bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match=r"has shape \(4,\); expected \(5,\), that of layer1\.bias"):
        restore_optimizer(optimizer.state_dict(), wide, names)


@pytest.mark.parametrize("name", ["layer9.scale", "layer0.scale"])
def test_restore_refuses_unknown_or_repeated_names(name: str) -> None:
    optimizer, names = shuffled_groups(Scales(), names=False)
    names[0][0] = name
    with pytest.raises(ValueError, match="twice, or the model lacks them"):
        restore_optimizer(optimizer.state_dict(), Scales(), names)


@pytest.mark.parametrize("decays", [(0.1, 0.1), (0.1, 0.0, 0.0)])
def test_restore_refuses_groups_without_rule(decays: tuple[float, ...]) -> None:
    model = Scales()
    parameters = list(model.parameters())
    groups = [{"params": parameters[index :: len(decays)], "weight_decay": decay} for index, decay in enumerate(decays)]
    with pytest.raises(ValueError, match=rf"has {len(decays)} groups .*Pass param_names="):
        restore_optimizer(torch.optim.AdamW(groups).state_dict(), model)


@pytest.mark.parametrize("flatten", [False, True])
def test_restore_reads_state_dict_by_names(flatten: bool) -> None:
    model = Scales()
    optimizer, names = shuffled_groups(model, names=False)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    live = adamw_state(optimizer, model)
    assert_same_state(adamw_state(restore_optimizer(saved, model), model), live)
    if not flatten:
        assert_same_state(adamw_state(restore_optimizer(saved, model, names), model), live)
    with pytest.raises(ValueError, match="param_names differ from the names in the optimizer's state dict"):
        restore_optimizer(saved, model, [group[::-1] for group in names])


def test_restore_refuses_state_in_no_group() -> None:
    model = Scales()
    saved: dict[str, Any] = get_optimizer_state_dict(model, shuffled_groups(model, names=False)[0])
    saved["param_groups"][0]["params"] = []
    with pytest.raises(ValueError, match=r"state holds \['layer2\.bias'\], which are in no group"):
        restore_optimizer(saved, model)


def test_restore_refuses_other_dicts() -> None:
    with pytest.raises(
        ValueError, match=r"no 'state' and 'param_groups'; expected both. Pass optimizer\.state_dict\(\)"
    ):
        restore_optimizer({"optimizer": {}}, Scales())


def test_restore_follows_older_decay_rule_by_counts(bases: Path) -> None:
    """Before pull request 35927 transformers let the norms of Qwen2 decay: names had no part in its rule."""
    model = AutoModelForCausalLM.from_pretrained(bases / "qwen2")
    parameters = dict(model.named_parameters())
    groups = [[name for name in parameters if name.endswith("bias") == bias] for bias in (False, True)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in group], "weight_decay": decay}
            for group, decay in zip(groups, (0.1, 0.0), strict=True)
        ]
    )
    for index, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full_like(parameter, index + 1.0)
    optimizer.step()
    live = adamw_state(optimizer, model)
    assert live.hyper["model.norm.weight"].weight_decay == 0.1
    assert_same_state(adamw_state(restore_optimizer(optimizer.state_dict(), model), model), live)
