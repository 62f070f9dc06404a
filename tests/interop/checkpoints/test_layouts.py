"""Checkpoints load the same from files and from ``torch.distributed.checkpoint``: one suite over both loaders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.checkpoint_models import CONFIGS, LORA, assert_same_state, assert_same_weights, train
from helpers.dcp_files import DCP_LAYOUTS, by_name, save_dcp
from helpers.present import present
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM

from fx_influence.interop.checkpoints.load import load_checkpoint
from fx_influence.interop.optimizers import adamw_state

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is",  # written in one process
    "ignore:`is_gradient_checkpointing` is deprecated",  # peft reads it
)

WEIGHT = "model.layers.1.mlp.up_proj.weight"


class Saved(NamedTuple):
    """A full checkpoint directory in one of two layouts, with an ``optimizer.pt``."""

    path: Path
    layout: str

    def save_model(self, model: Any) -> None:
        if self.layout == "files":
            model.save_pretrained(self.path)
        else:
            save_dcp({"model": get_model_state_dict(model)}, self.path)

    def save_weights(self, weights: Mapping[str, Tensor]) -> None:
        if self.layout == "files":
            save_file(dict(weights), self.path / "model.safetensors", metadata={"format": "pt"})
        else:
            save_dcp({"model": dict(weights)}, self.path)


@pytest.fixture(params=["files", "dcp"])
def saved(request: pytest.FixtureRequest, full: Path) -> Saved:
    checkpoint = Saved(full, request.param)
    checkpoint.save_model(AutoModelForCausalLM.from_pretrained(full))
    return checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["files", *DCP_LAYOUTS])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_load_full_matches_live_state(architecture: str, layout: str, bases: Path, tmp_path: Path) -> None:
    """The Trainer's own directory, or a directory of DCP, is the live training, with both weight-decay groups."""
    model = AutoModelForCausalLM.from_pretrained(bases / architecture)
    trainer = train(model, tmp_path / "trainer")
    path, base = tmp_path / "trainer" / "checkpoint-2", None
    if layout != "files":
        path, base = tmp_path / "dcp", bases / architecture
        save_dcp(DCP_LAYOUTS[layout](model, trainer.optimizer.optimizer), path)
    loaded = load_checkpoint(path, base=base)
    live = adamw_state(trainer.optimizer, model)
    assert_same_state(present(loaded.optimizer_state), live)
    assert set(live.step.values()) == {2}
    assert {hyper.weight_decay for hyper in live.hyper.values()} == {0.0, 0.1}
    # No two moments are equal, so none could stand for another unnoticed.
    assert not any(torch.equal(a, b) for a, b in combinations(live.exp_avg.values(), 2))
    assert_same_weights(loaded.model, model)
    assert not loaded.model.training
    assert loaded.eos_token_ids == load_checkpoint(bases / architecture, optimizer=False).eos_token_ids


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["files", "dcp by name"])
@pytest.mark.parametrize("kind", LORA)
def test_load_peft_matches_live_state(kind: str, layout: str, bases: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases / "llama")
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **LORA[kind]))
    trainer = train(model, tmp_path / "trainer")
    path, base = tmp_path / "trainer" / "checkpoint-2", None
    if layout != "files":
        config = path / "adapter_config.json"
        path, base = tmp_path / "dcp", bases / "llama"
        save_dcp(DCP_LAYOUTS[layout](model, trainer.optimizer.optimizer), path)
        shutil.copy(config, path)
    loaded = load_checkpoint(path, base=base)
    live = adamw_state(trainer.optimizer, model)
    assert_same_state(present(loaded.optimizer_state), live)
    assert not any(torch.equal(a, b) for a, b in combinations(live.exp_avg.values(), 2))
    assert {name for name, p in loaded.model.named_parameters() if p.requires_grad} == set(live.step)
    assert_same_weights(loaded.model, model)
    assert not loaded.model.training


@pytest.mark.parametrize("saved_dtype", [torch.bfloat16, torch.float64], ids=str)
def test_load_dtype_is_saved_or_requested(saved_dtype: torch.dtype, saved: Saved) -> None:
    saved.save_model(AutoModelForCausalLM.from_pretrained(saved.path, dtype=saved_dtype))
    assert {p.dtype for p in load_checkpoint(saved.path).model.parameters()} == {saved_dtype}
    for dtype in (torch.bfloat16, torch.float64):
        loaded = load_checkpoint(saved.path, dtype=dtype)
        assert {p.dtype for p in loaded.model.parameters()} == {dtype}
        # adamw_state widens narrower moments to float32.
        moments = {torch.float64: torch.float64, torch.bfloat16: torch.float32}[dtype]
        assert {value.dtype for value in present(loaded.optimizer_state).exp_avg.values()} == {moments}


def test_load_lists_every_eos_id(saved: Saved) -> None:
    assert load_checkpoint(saved.path).eos_token_ids == (1,)
    config = json.loads((saved.path / "generation_config.json").read_text())
    (saved.path / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [2, 1]}))
    assert load_checkpoint(saved.path).eos_token_ids == (2, 1)


def test_load_names_missing_config(saved: Saved) -> None:
    remedy = {"files": ".*Save the model there with save_pretrained", "dcp": ".*pass base="}[saved.layout]
    (saved.path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no config\.json; {remedy}"):
        load_checkpoint(saved.path)


CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "missing": lambda weights: {name: value for name, value in weights.items() if name != WEIGHT},
    "another shape": lambda weights: {**weights, WEIGHT: torch.zeros(3, 3)},
    "other names": lambda weights: {f"module.{name}": value for name, value in weights.items()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_load_refuses_weights_that_do_not_fit(change: str, saved: Saved) -> None:
    weights = load_file(saved.path / "model.safetensors")
    saved.save_weights(CHANGES[change](weights))
    name = WEIGHT if change != "other names" else "model.embed_tokens.weight"
    with pytest.raises(ValueError, match=rf"do not fit .*config\.json: missing or of another shape are .*{name}"):
        load_checkpoint(saved.path)


@pytest.mark.parametrize("layout", ["files", "dcp"])
def test_load_refuses_adapter_with_missing_weight(layout: str, adapter: Path, bases: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    missing = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    del weights[missing]
    save_file(weights, adapter / "adapter_model.safetensors")
    if layout == "dcp":
        save_dcp({"model": weights}, adapter)
    with pytest.raises(ValueError, match=rf"do not fit its adapter_config\.json: missing are \['{missing}'\] \(1 in"):
        load_checkpoint(adapter, base=bases / "llama", optimizer=False)


@pytest.mark.parametrize("layout", ["files", "dcp by name", "dcp flattened", "dcp by id"])
def test_load_refuses_foreign_optimizer_before_weights(layout: str, full: Path) -> None:
    """The weights cannot be read, so an error about the optimizer is raised before them."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(full)
    optimizer = torch.optim.RMSprop(model.parameters())
    if layout == "files":
        # Before its first step RMSprop is told by its groups alone.
        torch.save(optimizer.state_dict(), full / "optimizer.pt")
    else:
        save_dcp(DCP_LAYOUTS[layout](model, optimizer) | {"model": {"nothing": torch.zeros(1)}}, full)
    (full / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(TypeError, match=r"as of torch\.optim\.RMSprop; expected torch\.optim\.AdamW"):
        load_checkpoint(full)


def test_load_refuses_dcp_model_with_missing_adapter_weight(bases: Path, tmp_path: Path) -> None:
    """DCP may hold the complete model under its own names, adapter included."""
    config = LoraConfig(task_type="CAUSAL_LM", **LORA["lora"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(bases / "llama"), config)
    model.peft_config["default"].save_pretrained(tmp_path)
    weights = by_name(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))["model"]
    del weights["base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"]
    save_dcp({"model": weights}, tmp_path)
    with pytest.raises(ValueError, match=r"do not fit its adapter_config\.json: missing are \['base_model"):
        load_checkpoint(tmp_path, base=bases / "llama", optimizer=False)
