"""Directories of torch.distributed.checkpoint, as torch and accelerate write them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
from helpers.checkpoint_models import CONFIGS, LORA, assert_same_state, assert_same_weights, make_tokenizer, train
from helpers.dcp_files import save_dcp
from helpers.present import present
from helpers.versions import TORCH
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM

from fx_influence.interop.checkpoints.load import load_checkpoint
from fx_influence.interop.checkpoints.optimizer_state import restore_optimizer
from fx_influence.interop.optimizers import adamw_state

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is",  # written in one process
    "ignore:`is_gradient_checkpointing` is deprecated",  # peft reads it
)


FSDP2 = pytest.mark.skipif(TORCH < (2, 6), reason="accelerate has it from torch 2.6")


def trained(model: nn.Module, path: Path) -> torch.optim.AdamW:
    """Make two steps of transformers' Trainer and return its optimizer, with its decay and no-decay groups."""
    return train(model, path).optimizer.optimizer


@FSDP2
@pytest.mark.parametrize("kind", [None, *LORA])
def test_load_accelerate_fsdp_matches_live_state(kind: str | None, bases: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(bases / "llama")
    if kind is not None:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **LORA[kind]))
    optimizer = trained(model, tmp_path / "trainer")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    path = tmp_path / "checkpoint-2"
    # as Trainer calls them
    save_fsdp_model(plugin, Accelerator(cpu=True), model, str(path), adapter_only=True)
    save_fsdp_optimizer(plugin, Accelerator(cpu=True), optimizer, model, str(path))
    assert sorted(entry.name for entry in path.iterdir()) == ["optimizer_0", "pytorch_model_fsdp_0"]
    if kind is not None:
        shutil.copy(tmp_path / "trainer" / "checkpoint-2" / "adapter_config.json", path)
    loaded = load_checkpoint(path, base=bases / "llama")
    assert_same_state(present(loaded.optimizer_state), adamw_state(optimizer, model))
    assert_same_weights(loaded.model, model)


TWO_PROCESSES = """
import os, sys, torch
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
rank, base, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=2)
model = AutoModelForCausalLM.from_pretrained(base)
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
groups = [{"params": [p for p in model.parameters() if (p.ndim == 1) == flat], "lr": lr}
          for flat, lr in ((False, 0.01), (True, 0.02))]
optimizer = torch.optim.AdamW(groups)
ids = torch.randint(3, 12, (2, 6), generator=torch.Generator().manual_seed(rank))
for _ in range(2):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
dcp.save({"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=out)
full = StateDictOptions(full_state_dict=True, cpu_offload=True)
weights, state = (get_model_state_dict(model, options=full), get_optimizer_state_dict(model, optimizer, options=full))
if rank == 0:
    torch.save({"model": weights, "optim": state}, f"{out}.pt")
distributed.destroy_process_group()
os._exit(0)  # as ranks.end_rank, and for its reason
"""


@pytest.mark.slow
@FSDP2
def test_load_joins_shards_of_two_processes(tmp_path: Path) -> None:
    config = CONFIGS["qwen2"]()
    config.vocab_size = 13  # rows that two processes cannot share evenly
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    out = tmp_path / "dcp"
    command = [sys.executable, "-c", TWO_PROCESSES]
    processes = [subprocess.Popen([*command, str(rank), tmp_path / "base", out]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert {file.name for file in out.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    live = torch.load(f"{out}.pt")
    loaded = load_checkpoint(out, base=tmp_path / "base")
    assert all(torch.equal(loaded.model.state_dict()[name], value) for name, value in live["model"].items())
    assert_same_state(
        present(loaded.optimizer_state), adamw_state(restore_optimizer(live["optim"], loaded.model), loaded.model)
    )
    assert {hyper.lr_scale for hyper in present(loaded.optimizer_state).hyper.values()} == {1.0, 2.0}


def test_load_prefers_dcp_to_files(dcp_directory: Path, bases: Path) -> None:
    torch.save(torch.optim.SGD(nn.Linear(1, 1).parameters()).state_dict(), dcp_directory / "optimizer.pt")
    loaded = load_checkpoint(dcp_directory)
    beside = load_checkpoint(bases / "qwen2", optimizer=False).model
    assert all(not torch.equal(p, beside.get_parameter(name)) for name, p in loaded.model.named_parameters())
    assert set(present(loaded.optimizer_state).step.values()) == {1}


def test_load_reads_optimizer_file_beside_dcp_weights(dcp_directory: Path) -> None:
    model = load_checkpoint(dcp_directory, optimizer=False).model
    save_dcp({"model": get_model_state_dict(model)}, dcp_directory)
    torch.save(torch.optim.AdamW(model.parameters(), lr=0.25).state_dict(), dcp_directory / "optimizer.pt")
    loaded = load_checkpoint(dcp_directory)
    assert present(loaded.optimizer_state).lr == 0.25
    assert_same_weights(loaded.model, model)


def test_load_dcp_optimizer_before_first_step(dcp_directory: Path) -> None:
    model = load_checkpoint(dcp_directory, optimizer=False).model
    save_dcp({"optimizer": torch.optim.AdamW(model.parameters(), lr=0.5).state_dict()}, dcp_directory)
    loaded = load_checkpoint(dcp_directory)
    assert (present(loaded.optimizer_state).lr, set(present(loaded.optimizer_state).step.values())) == (0.5, {0})
    assert not any(value.any() for value in present(loaded.optimizer_state).exp_avg.values())


def test_load_reads_no_moments_without_optimizer(dcp_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = torch.load

    def recorded(*args: Any, **kwargs: Any) -> Any:
        read.append("")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", recorded)
    model = load_checkpoint(dcp_directory, optimizer=False).model
    assert len(read) == len(model.state_dict())


def test_load_names_missing_dcp_key(dcp_directory: Path, bases: Path) -> None:
    (dcp_directory / "model.safetensors").unlink()
    save_dcp({"network": AutoModelForCausalLM.from_pretrained(bases / "qwen2").state_dict()}, dcp_directory)
    with pytest.raises(FileNotFoundError, match=r"or \{'model': \.\.\.\} with torch\.distributed\.checkpoint\.save"):
        load_checkpoint(dcp_directory, optimizer=False)
    with pytest.raises(FileNotFoundError, match=r"or \{'optim': \.\.\.\} with torch\.distributed\.checkpoint\.save"):
        load_checkpoint(shutil.copytree(bases / "qwen2", dcp_directory, dirs_exist_ok=True))


def test_load_refuses_dcp_without_tensors(dcp_directory: Path) -> None:
    save_dcp({"model": {"epoch": 3}}, dcp_directory)
    with pytest.raises(ValueError, match=r"do not fit .*config\.json: missing"):
        load_checkpoint(dcp_directory, optimizer=False)
