"""Adapters in files of ranks: where their config comes from, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_models import assert_same_state, assert_same_weights
from helpers.present import present
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fx_influence.interop.checkpoints.load import load_checkpoint
from fx_influence.interop.optimizers import adamw_state

LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
META = json.dumps({"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"})


class Actor:
    """verl's directory of one rank after a step of a model with LoRA, without the adapter's config."""

    def __init__(self, base: Path, path: Path) -> None:
        shutil.copytree(base, path / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
        self.model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
                parameter.grad = torch.full_like(parameter, float(len(name)))
        self.optimizer.step()
        self.path = path
        self.save_weights("")
        torch.save(self.optimizer.state_dict(), path / "optim_world_size_1_rank_0.pt")

    def save_weights(self, part: str) -> None:
        weights = {name: value for name, value in self.model.state_dict().items() if part in name}
        torch.save(weights, self.path / "model_world_size_1_rank_0.pt")

    def assert_loaded(self, base: Path | None = None) -> None:
        loaded = load_checkpoint(self.path, base=base)
        assert_same_weights(loaded.model, self.model)
        assert_same_state(present(loaded.optimizer_state), adamw_state(self.optimizer, self.model))
        assert loaded.model.peft_config["default"].lora_alpha == 6


@pytest.fixture
def actor(bases: Path, tmp_path: Path) -> Actor:
    torch.manual_seed(0)
    return Actor(bases / "llama", tmp_path / "actor")


def test_load_takes_adapter_config_from_either_version(actor: Actor) -> None:
    with pytest.raises(ValueError, match=r"has weights of LoRA, and neither lora_train_meta\.json nor .*lora_alpha"):
        load_checkpoint(actor.path)
    (actor.path / "lora_train_meta.json").write_text(META)
    actor.assert_loaded()
    (actor.path / "lora_train_meta.json").unlink()
    actor.model.peft_config["default"].save_pretrained(actor.path / "lora_adapter")
    actor.assert_loaded()


def test_load_takes_base_of_adapter_saved_alone(actor: Actor, bases: Path) -> None:
    (actor.path / "lora_train_meta.json").write_text(META)
    actor.save_weights("lora_")
    with pytest.raises(FileNotFoundError, match=r"has the weights of an adapter alone; .* Pass base="):
        load_checkpoint(actor.path)
    actor.assert_loaded(bases / "llama")


def test_load_refuses_adapter_of_another_rank(actor: Actor) -> None:
    (actor.path / "lora_train_meta.json").write_text(META.replace("2", "3"))
    with pytest.raises(ValueError, match=r"(?s)do not fit its adapter_config\.json: .*size mismatch"):
        load_checkpoint(actor.path)


def test_load_refuses_adapter_of_unknown_parameters(actor: Actor) -> None:
    """An adapter with ``target_parameters`` is on experts' weights, whose names are not those of layers."""
    (actor.path / "lora_train_meta.json").write_text(META)
    weights = torch.load(actor.path / "model_world_size_1_rank_0.pt")
    weights["base_model.model.model.layers.0.mlp.experts.lora_A.default.weight"] = torch.zeros(4, 8)
    torch.save(weights, actor.path / "model_world_size_1_rank_0.pt")
    with pytest.raises(ValueError, match=r"for base_model\.model\.model\.layers\.0\.mlp\.experts, which is no layer"):
        load_checkpoint(actor.path)
