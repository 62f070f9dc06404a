"""Checkpoint directories, written by the real libraries, load with every parameter's own optimizer state."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.checkpoint_models import CONFIGS, LORA, assert_same_state, make_tokenizer, train
from helpers.golden import DATA, load_golden
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from transformers import (
    AutoModelForCausalLM,
)
from transformers.optimization import Adafactor

from fx_influence.interop.checkpoints.load import load_checkpoint, restore_optimizer
from fx_influence.interop.optimizers import adamw_state

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",  # peft reads it
)

STORES_NAMES = pytest.mark.skipif(torch.__version__ < (2, 6), reason="an optimizer stores names since torch 2.6")
READS_PICKLES = pytest.mark.skipif(
    torch.__version__ < (2, 6), reason="for older torch, transformers reads safetensors only"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory by architecture, each with a model and a tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config()).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def full(bases: Path, tmp_path: Path) -> Path:
    """A private copy of the Qwen2 directory with an optimizer.pt of its own."""
    path = tmp_path / "full"
    shutil.copytree(bases / "qwen2", path)
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.save(torch.optim.AdamW(model.parameters(), lr=0.1).state_dict(), path / "optimizer.pt")
    return path


@pytest.fixture
def adapter(bases: Path, tmp_path: Path) -> Path:
    """A private LoRA directory without an optimizer.pt."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases / "llama"), LoraConfig(task_type="CAUSAL_LM", **LORA["lora"])
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_full_trainer_checkpoint_is_the_live_state(architecture: str, bases: Path, tmp_path: Path) -> None:
    trainer = train(AutoModelForCausalLM.from_pretrained(bases / architecture), tmp_path)
    live = adamw_state(trainer.optimizer, trainer.model)
    loaded = load_checkpoint(tmp_path / "checkpoint-2")
    assert_same_state(loaded.optimizer_state, live)
    assert set(live.step.values()) == {2}
    assert {hyper.weight_decay for hyper in live.hyper.values()} == {0.0, 0.1}
    # no two moments are equal, so none could stand for another unnoticed
    assert not any(torch.equal(a, b) for a, b in combinations(live.exp_avg.values(), 2))
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter)
    assert not loaded.model.training


@pytest.mark.parametrize("kind", LORA)
def test_a_peft_trainer_checkpoint_is_the_live_state(kind: str, bases: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(bases / "llama")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, **LORA[kind]))
    trainer = train(model, tmp_path)
    live = adamw_state(trainer.optimizer, model)
    loaded = load_checkpoint(tmp_path / "checkpoint-2")
    assert_same_state(loaded.optimizer_state, live)
    assert not any(torch.equal(a, b) for a, b in combinations(live.exp_avg.values(), 2))
    assert {name for name, p in loaded.model.named_parameters() if p.requires_grad} == set(live.step)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter)
    assert not loaded.model.training


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


def test_load_finished_schedule_has_lr_zero(bases: Path, tmp_path: Path) -> None:
    trainer = train(AutoModelForCausalLM.from_pretrained(bases / "qwen2"), tmp_path, schedule="linear")
    loaded = load_checkpoint(tmp_path / "checkpoint-2").optimizer_state
    assert_same_state(loaded, adamw_state(trainer.optimizer, trainer.model))
    assert loaded.lr == 0.0
    assert {hyper.lr_scale for hyper in loaded.hyper.values()} == {1.0}


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.bias = nn.Parameter(torch.zeros(4))


class Scales(nn.Module):
    """Every parameter has the same shape, and every other one has no weight decay in the Trainer's rule."""

    def __init__(self) -> None:
        super().__init__()
        self.layer0, self.layer1, self.layer2 = Scale(), Scale(), Scale()


def test_restore_maps_parameters_of_equal_shape() -> None:
    model = Scales()
    named = dict(model.named_parameters())
    groups = [[name for name in named if ("bias" in name) == bias] for bias in (False, True)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[name] for name in group], "weight_decay": decay}
            for group, decay in zip(groups, (0.1, 0.0), strict=True)
        ]
    )
    for index, parameter in enumerate(named.values()):
        parameter.grad = torch.full((4,), float(index + 1))
    optimizer.step()
    saved, live = optimizer.state_dict(), adamw_state(optimizer, model)
    # named_parameters() order fits every shape and is wrong
    plain = dict(zip(named, (entry["exp_avg"] for entry in saved["state"].values()), strict=True))
    assert all(plain[name].shape == value.shape for name, value in live.exp_avg.items())
    assert sum(not torch.equal(plain[name], value) for name, value in live.exp_avg.items()) == 4
    assert_same_state(adamw_state(restore_optimizer(saved, model), model), live)


def _shuffled(model: nn.Module, names: bool) -> tuple[torch.optim.AdamW, list[list[str]]]:
    """An AdamW over three groups in an order of its own, after a step."""
    named = list(model.named_parameters())[::-1]
    groups = [named[:1], named[1:4], named[4:]]
    optimizer = torch.optim.AdamW([{"params": group if names else [p for _, p in group]} for group in groups])
    for index, (_, parameter) in enumerate(named):
        parameter.grad = torch.full_like(parameter, index + 1.0)
    optimizer.step()
    return optimizer, [[name for name, _ in group] for group in groups]


def test_restore_maps_any_grouping_by_param_names() -> None:
    model = Scales()
    optimizer, names = _shuffled(model, names=False)
    restored = restore_optimizer(optimizer.state_dict(), model, names)
    assert_same_state(adamw_state(restored, model), adamw_state(optimizer, model))


@STORES_NAMES
def test_restore_maps_any_grouping_by_stored_names() -> None:
    model = Scales()
    optimizer, _ = _shuffled(model, names=True)
    assert_same_state(
        adamw_state(restore_optimizer(optimizer.state_dict(), model), model), adamw_state(optimizer, model)
    )


@STORES_NAMES
def test_restore_prefers_param_names_to_stored_names() -> None:
    model = Scales()
    optimizer, names = _shuffled(model, names=True)
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
    optimizer, names = _shuffled(model, names=False)
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
    with pytest.raises(ValueError, match=r"groups hold \[5\] parameters.* order gives \[6\].*param_names="):
        restore_optimizer(saved, Scales())


def test_restore_names_both_shapes_when_they_differ() -> None:
    optimizer, names = _shuffled(Scales(), names=False)
    wide = Scales()
    wide.layer1.bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match=r"layer1\.bias, but its exp_avg has shape \(4,\) and the parameter \(5,\)"):
        restore_optimizer(optimizer.state_dict(), wide, names)


@pytest.mark.parametrize("name", ["layer9.scale", "layer0.scale"])
def test_restore_refuses_unknown_or_repeated_names(name: str) -> None:
    optimizer, names = _shuffled(Scales(), names=False)
    names[0][0] = name
    with pytest.raises(ValueError, match="twice there or not in the model"):
        restore_optimizer(optimizer.state_dict(), Scales(), names)


@pytest.mark.parametrize("decays", [(0.1, 0.1), (0.1, 0.0, 0.0)])
def test_restore_refuses_groups_without_rule(decays: tuple[float, ...]) -> None:
    model = Scales()
    parameters = list(model.parameters())
    groups = [{"params": parameters[index :: len(decays)], "weight_decay": decay} for index, decay in enumerate(decays)]
    with pytest.raises(ValueError, match=rf"has {len(decays)} groups .*pass param_names="):
        restore_optimizer(torch.optim.AdamW(groups).state_dict(), model)


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


OTHERS: dict[str, type[torch.optim.Optimizer]] = {
    f"torch.optim.{name}": kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "AdamW")
} | {"the Adafactor of transformers": Adafactor}
# no field is theirs alone
UNNAMED = {"torch.optim.SparseAdam", "torch.optim.RAdam"}
if torch.__version__ < (2, 7):
    # there its state dict cannot be told from AdamW's
    del OTHERS["torch.optim.Adam"]


@pytest.mark.parametrize("name", OTHERS)
def test_restore_names_other_optimizers(name: str) -> None:
    model = Matrix()
    optimizer = OTHERS[name](model.parameters())
    model.weight.grad = torch.ones(4, 4)
    if name != "torch.optim.SparseAdam":
        optimizer.step(lambda: model.weight.sum())
    of = "not AdamW's" if name in UNNAMED else re.escape(name.replace("torch.optim.Muon", "Muon"))
    with pytest.raises(TypeError, match=rf"the optimizer's state.*{of}.*supported are torch\.optim\.AdamW"):
        restore_optimizer(optimizer.state_dict(), model)


BITSANDBYTES = {"alpha", "betas", "eps", "lr", "t_alpha", "t_beta3", "weight_decay"}
RECORDED: dict[str, tuple[str, set[str], set[str]]] = {
    "bitsandbytes 0.50": ("bitsandbytes", BITSANDBYTES, {"step", "__bnb_optimizer_quant_state__"}),
    "bitsandbytes 0.42": (
        "bitsandbytes",
        {"betas", "eps", "lr", "weight_decay"},
        {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"},
    ),
    "lion-pytorch 0.2": ("Lion", {"betas", "lr", "weight_decay"}, {"exp_avg"}),
    "pytorch-optimizer 4.1, AdEMAMix": (
        "AdEMAMix",
        {"alpha", "betas", "eps", "fixed_decay", "foreach", "lr", "step", "t_alpha_beta3", "weight_decay"},
        {"exp_avg", "exp_avg_sq", "exp_avg_slow"},
    ),
    "schedulefree 1.4": (
        "schedule-free AdamW",
        {"betas", "eps", "k", "lr", "lr_max", "r", "train_mode", "warmup_steps", "weight_decay", "weight_lr_power"},
        {"z", "exp_avg_sq"},
    ),
    "galore-torch 1.0": (
        "GaLore",
        {"betas", "correct_bias", "eps", "lr", "proj_type", "rank", "scale", "update_proj_gap", "weight_decay"},
        {"step", "exp_avg", "exp_avg_sq"},
    ),
    "pytorch-optimizer 4.1, SOAP": (
        "SOAP",
        {"betas", "correct_bias", "eps", "lr", "precondition_frequency", "shampoo_beta", "weight_decay"},
        {"exp_avg", "exp_avg_sq", "GG", "Q"},
    ),
    "pytorch-optimizer 4.1, Prodigy": (
        "Prodigy",
        {"beta3", "betas", "d", "d0", "d_coef", "d_max", "eps", "growth_rate", "lr", "weight_decay"},
        {"s", "p0", "exp_avg", "exp_avg_sq"},
    ),
}
"""What each writes of an optimizer, and fields of its groups and states, from their ``state_dict()`` or source."""


@pytest.mark.parametrize("version", RECORDED)
def test_restore_names_optimizers_of_other_libraries(version: str) -> None:
    of, group, entry = RECORDED[version]
    saved = {
        "param_groups": [dict.fromkeys(group, 0.0) | {"params": [0]}],
        "state": {0: dict.fromkeys(entry, torch.zeros(4, 4))},
    }
    with pytest.raises(TypeError, match=rf"seems to be of {of}.*; supported are torch\.optim\.AdamW"):
        restore_optimizer(saved, Matrix())


@pytest.mark.parametrize("field", [{"momentum": 0.9}, {"betas": (0.9, 0.99, 0.999)}], ids=str)
def test_restore_refuses_group_fields_adamw_lacks(field: dict[str, Any]) -> None:
    optimizer, names = _shuffled(Scales(), names=False)
    saved = optimizer.state_dict()
    saved["param_groups"][1].update(field)
    with pytest.raises(TypeError, match=r"param_groups\[1\].*supported are torch\.optim\.AdamW"):
        restore_optimizer(saved, Scales(), names)


def test_restore_refuses_8_bit_state() -> None:
    model = Scales()
    optimizer, names = _shuffled(model, names=False)
    saved = optimizer.state_dict()
    saved["state"][3] = {"step": 1, "state1": torch.zeros(4, dtype=torch.uint8), "state2": torch.zeros(4)}
    with pytest.raises(
        TypeError, match=r"parameter 3 has .*'state1', 'state2', 'step'\], .*bitsandbytes.*supported are"
    ):
        restore_optimizer(saved, model, names)


class Quantized(torch.Tensor):
    """As torchao keeps its 8-bit states."""


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.zeros(4).as_subclass(Quantized), r"Quantized of torch\.float32"),
        (torch.zeros(4, dtype=torch.uint8), r"Tensor of torch\.uint8"),
        (torch.zeros(4, dtype=torch.int32), r"Tensor of torch\.int32"),
        (torch.zeros(4).to(torch.float8_e4m3fn), r"Tensor of torch\.float8_e4m3fn"),
    ],
)
def test_restore_refuses_quantized_moments(value: torch.Tensor, kind: str) -> None:
    optimizer, names = _shuffled(Scales(), names=False)
    saved = optimizer.state_dict()
    saved["state"][3]["exp_avg_sq"] = value
    with pytest.raises(TypeError, match=rf"parameter 3 has a {kind} as exp_avg_sq, .*8-bit.*; supported are"):
        restore_optimizer(saved, Scales(), names)


def test_restore_refuses_unknown_state_field() -> None:
    optimizer, names = _shuffled(Scales(), names=False)
    saved = optimizer.state_dict()
    saved["state"][3]["last_grad"] = torch.zeros(4)
    with pytest.raises(TypeError, match=r"parameter 3 has the fields .*'last_grad', 'step'\], not AdamW's; supported"):
        restore_optimizer(saved, Scales(), names)


@pytest.mark.parametrize("flatten", [False, True])
def test_restore_reads_state_dict_by_names(flatten: bool) -> None:
    model = Scales()
    optimizer, names = _shuffled(model, names=False)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    live = adamw_state(optimizer, model)
    assert_same_state(adamw_state(restore_optimizer(saved, model), model), live)
    if not flatten:
        assert_same_state(adamw_state(restore_optimizer(saved, model, names), model), live)
    with pytest.raises(ValueError, match="param_names are not the names in the optimizer's state dict"):
        restore_optimizer(saved, model, [group[::-1] for group in names])


def test_restore_refuses_state_in_no_group() -> None:
    model = Scales()
    saved = get_optimizer_state_dict(model, _shuffled(model, names=False)[0])
    saved["param_groups"][0]["params"] = []
    with pytest.raises(ValueError, match=r"state holds \['layer2\.bias'\], which are in no group"):
        restore_optimizer(saved, model)


def test_restore_refuses_other_dicts() -> None:
    with pytest.raises(ValueError, match=r"no 'state' and 'param_groups'; pass optimizer\.state_dict\(\)"):
        restore_optimizer({"optimizer": {}}, Scales())


def test_load_joins_safetensors_shards(full: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(full)
    (full / "model.safetensors").unlink()
    model.save_pretrained(full, max_shard_size="3KB")
    assert len(list(full.glob("model-*.safetensors"))) > 1
    assert not (full / "model.safetensors").exists()
    loaded = load_checkpoint(full)
    assert all(torch.equal(loaded.model.get_parameter(n), p) for n, p in model.named_parameters())


@READS_PICKLES
def test_load_reads_pickled_weights_as_tensors(full: Path) -> None:
    weights = load_file(full / "model.safetensors")
    (full / "model.safetensors").unlink()
    torch.save(weights, full / "pytorch_model.bin")
    loaded = load_checkpoint(full)
    assert all(torch.equal(loaded.model.get_parameter(name), value) for name, value in weights.items())


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["optimizer.pt", pytest.param("pytorch_model.bin", marks=READS_PICKLES)])
def test_load_never_unpickles(file: str, full: Path, tmp_path: Path) -> None:
    (full / "model.safetensors").unlink()
    torch.save({}, full / "pytorch_model.bin")
    torch.save({"state": Bomb(tmp_path / "ran"), "param_groups": []}, full / file)
    # without a dtype in its config, transformers reads the weights twice, and heeds weights_only only the first time
    config = json.loads((full / "config.json").read_text())
    del config["dtype"]
    (full / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="never unpickled"):
        load_checkpoint(full)
    assert not (tmp_path / "ran").exists()


class Projector:
    """As GaLore keeps one in its state."""


def test_load_names_class_that_is_not_unpickled(full: Path) -> None:
    torch.save({"state": {0: {"projector": Projector()}}, "param_groups": []}, full / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer\.pt .*\(.*test_\w+\.Projector\), which are never unpickled"):
        load_checkpoint(full)


def test_load_reads_full_state_of_accelerate(full: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(full)
    optimizer = torch.optim.AdamW(reversed(list(model.parameters())), lr=0.1)
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, index + 1.0)
    optimizer.step()
    (full / "optimizer.pt").unlink()
    torch.save(get_optimizer_state_dict(model, optimizer), full / "optimizer.bin")
    assert_same_state(load_checkpoint(full).optimizer_state, adamw_state(optimizer, model))


def test_load_refuses_damaged_optimizer_file(full: Path) -> None:
    (full / "optimizer.pt").write_bytes((full / "optimizer.pt").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"optimizer\.pt is damaged"):
        load_checkpoint(full)


def test_another_optimizers_checkpoint_is_refused_before_the_weights_are_read(full: Path) -> None:
    (full / "model.safetensors").write_bytes(b"not read")
    torch.save(torch.optim.SGD(Scales().parameters(), lr=0.1).state_dict(), full / "optimizer.pt")
    with pytest.raises(TypeError, match=r"supported are torch\.optim\.AdamW"):
        load_checkpoint(full)


def test_load_policy_without_optimizer_file(full: Path) -> None:
    (full / "optimizer.pt").unlink()
    loaded = load_checkpoint(full, optimizer=False)
    assert loaded.optimizer_state is None
    assert loaded.path == full


def test_dtype_is_as_saved_or_as_asked(full: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(full)
    model.to(torch.bfloat16).save_pretrained(full)
    assert load_checkpoint(full).model.dtype == torch.bfloat16
    loaded = load_checkpoint(full, dtype=torch.float64)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float64}
    assert {value.dtype for value in loaded.optimizer_state.exp_avg.values()} == {torch.float64}


def test_every_id_that_ends_a_completion_is_listed(full: Path) -> None:
    assert load_checkpoint(full).eos_token_ids == (1,)
    config = json.loads((full / "generation_config.json").read_text())
    (full / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [2, 1]}))
    assert load_checkpoint(full).eos_token_ids == (2, 1)


def test_load_adapter_takes_base_from_config_or_argument(adapter: Path, bases: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(adapter, optimizer=False, dtype=torch.float64)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float64}
    assert len(loaded.tokenizer) == 12
    moved = shutil.copytree(bases / "llama", tmp_path / "moved")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/model"}))
    with pytest.raises(FileNotFoundError, match=r"is 'some/model', which is not a local directory; pass base="):
        load_checkpoint(adapter, optimizer=False)
    loaded = load_checkpoint(adapter, base=moved, optimizer=False)
    assert isinstance(loaded.model, PeftModel)
    assert any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_an_adapter_with_a_missing_weight_is_refused(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    gone = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    del weights[gone]
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"missing are \['{gone}'\] \(1 in all\)"):
        load_checkpoint(adapter, optimizer=False)


def test_load_refuses_adapter_weight_of_another_shape(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    save_file(weights | {name: torch.zeros(3, 3)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)do not fit its adapter_config\.json: .*size mismatch"):
        load_checkpoint(adapter, optimizer=False)


def test_load_reports_biases_older_peft_does_not_save(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = AutoModelForCausalLM.from_pretrained(bases / "llama")
    get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], bias="lora_only")
    ).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "bias" not in name}, tmp_path / "adapter_model.safetensors"
    )
    real = peft.get_peft_model_state_dict
    older = lambda *args, **kwargs: {k: v for k, v in real(*args, **kwargs).items() if "bias" not in k}  # noqa: E731
    monkeypatch.setattr(peft, "get_peft_model_state_dict", older)
    with pytest.raises(ValueError, match=r"4 tensors stand for 6 trained parameters \(peft before 0\.21"):
        load_checkpoint(tmp_path, optimizer=False)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_that_do_not_fit_the_config_are_refused(change: str, full: Path) -> None:
    weights = load_file(full / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = torch.zeros(3, 3)
    if change == "missing":
        del weights[name]
    save_file(weights, full / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"do not fit .*config\.json: .*{name}"):
        load_checkpoint(full)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", r"has no config\.json; save the model there with save_pretrained"),
        ("model.safetensors", r"has no model\.safetensors or model\.safetensors\.index\.json .*save_pretrained"),
        ("tokenizer.json", r"no tokenizer in .*tokenizer\.save_pretrained"),
        ("optimizer.pt", r"has no optimizer\.pt or optimizer\.bin; .*pass optimizer=False"),
    ],
)
def test_load_names_missing_file(file: str, message: str, full: Path) -> None:
    (full / file).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_checkpoint(full)


def test_load_names_missing_adapter_weights(adapter: Path, bases: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors or adapter_model\.bin"):
        load_checkpoint(adapter, base=bases / "llama", optimizer=False)


@pytest.mark.parametrize("field", ["path", "base"])
def test_load_names_path_that_is_no_directory(field: str, full: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{field} is .*nowhere', not a directory; pass a local checkpoint"):
        load_checkpoint(**{"path": full, field: full / "nowhere"})


def test_load_refuses_vocabulary_mismatch_before_weights(full: Path) -> None:
    make_tokenizer(size=15).save_pretrained(full)
    (full / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ValueError, match=r"the tokenizer has 15 tokens, the model in .* 12 embedding rows"):
        load_checkpoint(full)


def test_load_takes_missing_tokenizer_from_base(full: Path, bases: Path) -> None:
    (full / "tokenizer.json").unlink()
    assert len(load_checkpoint(full, base=bases / "llama").tokenizer) == 12
    assert load_checkpoint(full, base=bases / "llama").model.config.model_type == "qwen2"


def test_load_uses_recorded_param_names(tmp_path: Path) -> None:
    golden = load_golden(torch.float32)
    base, path = tmp_path / "base", tmp_path / "adapter"
    golden.model.save_pretrained(path, save_embedding_layers=False)
    golden.model.unload().save_pretrained(base)
    shutil.copytree(DATA / "tokenizer", path, dirs_exist_ok=True)
    shutil.copy(DATA / "optimizer.pt", path)
    names = json.loads((DATA / "optimizer_param_names.json").read_text())
    (path / "optimizer_param_names.json").write_text(json.dumps(names))
    loaded = load_checkpoint(path, base=base)
    assert_same_state(loaded.optimizer_state, golden.opt_state)
    assert all(torch.equal(loaded.model.get_parameter(name), value) for name, value in golden.params.items())
    # of the same shape, so that only the record can tell
    first, second = (f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_A.default.weight" for layer in (0, 1))
    swap = {first: second, second: first}
    (path / "optimizer_param_names.json").write_text(json.dumps([[swap.get(n, n) for n in names[0]]]))
    swapped = load_checkpoint(path, base=base).optimizer_state
    assert torch.equal(swapped.exp_avg[first], golden.opt_state.exp_avg[second])
