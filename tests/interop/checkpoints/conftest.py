"""Checkpoint directories that the tests read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoint_models import CONFIGS, LORA, make_tokenizer
from helpers.dcp_files import by_name, save_dcp
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model and a tokenizer of each architecture, and return their parent directory."""
    root = tmp_path_factory.mktemp("bases")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config()).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def full(bases: Path, tmp_path: Path) -> Path:
    """Return a private copy of the Qwen2 directory with its own optimizer.pt."""
    path = tmp_path / "full"
    shutil.copytree(bases / "qwen2", path)
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.save(torch.optim.AdamW(model.parameters(), lr=0.1).state_dict(), path / "optimizer.pt")
    return path


@pytest.fixture
def adapter(bases: Path, tmp_path: Path) -> Path:
    """Return a private LoRA directory without an optimizer.pt."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases / "llama"), LoraConfig(task_type="CAUSAL_LM", **LORA["lora"])
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def dcp_directory(bases: Path, tmp_path: Path) -> Path:
    """Return a DCP directory beside Hugging Face files with other weights."""
    path = shutil.copytree(bases / "qwen2", tmp_path / "dcp")
    model = AutoModelForCausalLM.from_pretrained(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_dcp(by_name(model, optimizer), path)
    return path
