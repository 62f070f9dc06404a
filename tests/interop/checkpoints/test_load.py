"""Checkpoint directories of files, written by the real libraries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoint_models import assert_same_state, make_tokenizer, train
from helpers.dcp_files import MaliciousPickle
from helpers.golden import DATA, load_golden
from helpers.present import present
from helpers.versions import TORCH
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers import (
    AutoModelForCausalLM,
)

from fx_influence.interop.checkpoints.load import load_checkpoint
from fx_influence.interop.optimizers import adamw_state

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",  # peft reads it
)


READS_PICKLES = pytest.mark.skipif(TORCH < (2, 6), reason="for older torch, transformers reads safetensors only")


def test_load_finished_schedule_has_lr_zero(bases: Path, tmp_path: Path) -> None:
    trainer = train(AutoModelForCausalLM.from_pretrained(bases / "qwen2"), tmp_path, schedule="linear")
    loaded = load_checkpoint(tmp_path / "checkpoint-2").optimizer_state
    assert_same_state(present(loaded), adamw_state(trainer.optimizer, trainer.model))
    assert present(loaded).lr == 0.0
    assert {hyper.lr_scale for hyper in present(loaded).hyper.values()} == {1.0}


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


@pytest.mark.parametrize("file", ["optimizer.pt", pytest.param("pytorch_model.bin", marks=READS_PICKLES)])
def test_load_never_unpickles(file: str, full: Path, tmp_path: Path) -> None:
    (full / "model.safetensors").unlink()
    torch.save({}, full / "pytorch_model.bin")
    torch.save({"state": MaliciousPickle(tmp_path / "ran"), "param_groups": []}, full / file)
    # without a dtype in its config, transformers reads the weights twice, and heeds weights_only only the first time
    config = json.loads((full / "config.json").read_text())
    del config["dtype"]
    (full / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="never unpickled"):
        load_checkpoint(full)
    assert not (tmp_path / "ran").exists()


class Projector:
    """A projector as GaLore keeps one in its state."""


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
    assert_same_state(present(load_checkpoint(full).optimizer_state), adamw_state(optimizer, model))


def test_load_refuses_damaged_optimizer_file(full: Path) -> None:
    (full / "optimizer.pt").write_bytes((full / "optimizer.pt").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"optimizer\.pt is damaged"):
        load_checkpoint(full)


def test_load_policy_without_optimizer_file(full: Path) -> None:
    (full / "optimizer.pt").unlink()
    loaded = load_checkpoint(full, optimizer=False)
    assert loaded.optimizer_state is None
    assert loaded.path == full


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", r"has no config\.json; expected it\. Save the model there with save_pretrained"),
        ("model.safetensors", r"has no model\.safetensors or model\.safetensors\.index\.json .*save_pretrained"),
        ("tokenizer.json", r"no tokenizer in .*tokenizer\.save_pretrained"),
        ("optimizer.pt", r"has no optimizer\.pt or optimizer\.bin; .*pass optimizer=False"),
    ],
)
def test_load_names_missing_file(file: str, message: str, full: Path) -> None:
    (full / file).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_checkpoint(full)


@pytest.mark.parametrize("field", ["path", "base"])
def test_load_names_path_that_is_no_directory(field: str, full: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{field} is .*nowhere'; expected a local checkpoint"):
        load_checkpoint(full / "nowhere" if field == "path" else full, base=full / "nowhere")


def test_load_refuses_vocabulary_mismatch_before_weights(full: Path) -> None:
    make_tokenizer(size=15).save_pretrained(full)
    (full / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(
        ValueError, match=r"the tokenizer has 15 tokens; expected at most 12, the rows of the embedding"
    ):
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
    assert_same_state(present(loaded.optimizer_state), golden.opt_state)
    assert all(torch.equal(loaded.model.get_parameter(name), value) for name, value in golden.params.items())
    # of the same shape, so that only the record can tell
    first, second = (f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_A.default.weight" for layer in (0, 1))
    swap = {first: second, second: first}
    (path / "optimizer_param_names.json").write_text(json.dumps([[swap.get(n, n) for n in names[0]]]))
    swapped = load_checkpoint(path, base=base).optimizer_state
    assert torch.equal(present(swapped).exp_avg[first], golden.opt_state.exp_avg[second])
