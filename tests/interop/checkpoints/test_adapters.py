"""PEFT adapters: their base model, and weights that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
)

from fx_influence.interop.checkpoints.load import load_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",  # peft reads it
)


def test_load_adapter_takes_base_from_config_or_argument(adapter: Path, bases: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(adapter, optimizer=False, dtype=torch.float64)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float64}
    assert len(loaded.tokenizer) == 12
    moved = shutil.copytree(bases / "llama", tmp_path / "moved")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/model"}))
    with pytest.raises(
        FileNotFoundError, match=r"is 'some/model'; expected a local directory, since nothing is downloaded. Pass base="
    ):
        load_checkpoint(adapter, optimizer=False)
    loaded = load_checkpoint(adapter, base=moved, optimizer=False)
    assert isinstance(loaded.model, PeftModel)
    assert any(parameter.requires_grad for parameter in loaded.model.parameters())


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


def test_load_names_missing_adapter_weights(adapter: Path, bases: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors or adapter_model\.bin"):
        load_checkpoint(adapter, base=bases / "llama", optimizer=False)
