"""Directories as trainers lay them out: where config, weights and optimizer state are looked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_models import assert_same_state, assert_same_weights
from helpers.dcp_files import by_name, flattened, save_dcp
from helpers.present import present
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
)
from transformers import AutoModelForCausalLM

from fx_influence.interop.checkpoints.load import load_checkpoint, load_tokenizer
from fx_influence.interop.optimizers import adamw_state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")  # written in one process


class Live:
    """A model that has made a step, and the directory of its base."""

    def __init__(self, base: Path, seed: int = 0) -> None:
        self.base = base
        self.model: Any = AutoModelForCausalLM.from_pretrained(base)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()

    def assert_loaded(self, path: Path, base: Path | None = None) -> None:
        loaded = load_checkpoint(path, base=base)
        assert_same_weights(loaded.model, self.model)
        assert_same_state(present(loaded.optimizer_state), adamw_state(self.optimizer, self.model))


@pytest.fixture
def live(bases: Path) -> Live:
    return Live(bases / "llama")


class App:
    """prime-rl's ``AppState``."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizers = get_state_dict(self.model, [self.optimizer])
        return {"model": model, "optimizers": optimizers, "progress": {"step": 3, "total_tokens": 9}}

    def load_state_dict(self, saved: dict[str, Any]) -> None: ...


def test_load_prime_rl(live: Live, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step_3" / "trainer"
    path.mkdir(parents=True)
    save_dcp({"app": App(live.model, live.optimizer)}, path)
    live.assert_loaded(tmp_path, live.base)


def test_load_nemo_rl(live: Live, tmp_path: Path) -> None:
    """NeMo-RL's native_checkpoint saves the optimizer under ``optim.optim``, beside its scheduler."""
    policy = tmp_path / "step_5" / "policy"
    for name in ("weights", "optimizer"):
        (policy / name).mkdir(parents=True)
    saved = by_name(live.model, live.optimizer)
    save_dcp({"model": saved["model"]}, policy / "weights")
    save_dcp({"optim": {"optim": saved["optim"], "sched": {"last_epoch": 5}}}, policy / "optimizer")
    shutil.copytree(live.base, policy / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    live.assert_loaded(tmp_path, live.base)
    assert load_tokenizer(tmp_path).eos_token == "<eos>"


def test_load_torchtitan(live: Live, tmp_path: Path) -> None:
    """torchtitan's weights are at the top level, its optimizer is flattened."""
    path = tmp_path / "checkpoint" / "step-7"
    path.mkdir(parents=True)
    saved = flattened(live.model, live.optimizer)
    state = {**saved["model"], "optimizer": saved["optim"], "train_state": {"step": torch.tensor(7)}}
    save_dcp(state, path)
    live.assert_loaded(tmp_path, live.base)
    save_dcp({"tok_embeddings.weight": torch.zeros(2, 2), "optimizer": saved["optim"]}, path)
    with pytest.raises(ValueError, match=r"tok_embeddings\.weight, as torchtitan's own models.*convert_to_hf"):
        load_checkpoint(tmp_path, base=live.base)


def test_load_skyrl(live: Live, tmp_path: Path) -> None:
    policy = tmp_path / "global_step_5" / "policy"
    shutil.copytree(live.base, policy / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(live.model.state_dict(), policy / "model_world_size_1_rank_0.pt")
    torch.save(live.optimizer.state_dict(), policy / "optim_world_size_1_rank_0.pt")
    live.assert_loaded(tmp_path)


def test_load_areal(live: Live, tmp_path: Path) -> None:
    """AReaL saves the optimizer's files of ranks beside transformers' weights."""
    live.model.save_pretrained(tmp_path)
    shutil.copy(live.base / "tokenizer.json", tmp_path)
    shutil.copy(live.base / "tokenizer_config.json", tmp_path)
    torch.save(live.optimizer.state_dict(), tmp_path / "optim_world_size_1_rank_0.pt")
    live.assert_loaded(tmp_path)


def test_load_accelerate_full_state_dict(live: Live, tmp_path: Path) -> None:
    options = StateDictOptions(full_state_dict=True)
    torch.save(get_model_state_dict(live.model, options=options), tmp_path / "pytorch_model_fsdp.bin")
    torch.save(get_optimizer_state_dict(live.model, live.optimizer, options=options), tmp_path / "optimizer.bin")
    live.assert_loaded(tmp_path, live.base)


def save_trainer_checkpoint(live: Live, path: Path) -> None:
    live.model.save_pretrained(path)
    shutil.copy(live.base / "tokenizer.json", path)
    shutil.copy(live.base / "tokenizer_config.json", path)
    torch.save(live.optimizer.state_dict(), path / "optimizer.pt")


def test_load_takes_last_checkpoint_and_says_so(live: Live, tmp_path: Path) -> None:
    save_trainer_checkpoint(Live(live.base, seed=1), tmp_path / "checkpoint-9")
    save_trainer_checkpoint(live, tmp_path / "checkpoint-10")
    with pytest.warns(UserWarning, match="holds checkpoint-9, checkpoint-10; reading checkpoint-10, weights and"):
        live.assert_loaded(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-9")
    live.assert_loaded(tmp_path)


def test_load_prefers_checkpoint_to_weights_without_optimizer(live: Live, tmp_path: Path) -> None:
    """The trainer saves the last model to ``output_dir`` itself, without the state of its optimizer."""
    other = Live(live.base, seed=1)
    save_trainer_checkpoint(other, tmp_path)
    (tmp_path / "optimizer.pt").unlink()
    save_trainer_checkpoint(live, tmp_path / "checkpoint-10")
    with pytest.warns(UserWarning, match="reading checkpoint-10"):
        live.assert_loaded(tmp_path)
    assert_same_weights(load_checkpoint(tmp_path, optimizer=False).model, other.model)


FOREIGN = {
    "Megatron": ("dist_ckpt/common.pt", "model_merger merge --backend megatron"),
    "Megatron (torch_dist)": ("iter_0000004/metadata.json", "optimizer=False"),
    "universal": ("zero/model.norm.weight/fp32.pt", "converted from, global_step"),
    "pipeline": ("layer_00-model_00-model_states.pt", "without pipeline parallelism"),
    "without ZeRO": ("mp_rank_00_model_states.pt", r"zero_optimization\.stage"),
    "one file a rank": ("pytorch_model_fsdp_0_rank1.bin", "use_dcp=True"),
    "Orbax": ("default/_METADATA", "save_pretrained"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_load_names_foreign_format(name: str, bases: Path, tmp_path: Path) -> None:
    file, remedy = FOREIGN[name]
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    shutil.copy(bases / "llama" / "config.json", tmp_path)
    with pytest.raises(ValueError, match=rf"is a checkpoint of .*{name.split(' (')[0]}.*{remedy}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs.*git lfs pull"),
        (lambda data: b"<!DOCTYPE html><html>", "an HTML or XML page.*Download it again"),
        (lambda data: data[: len(data) // 2], "cut off after"),
        (lambda data: b"", "empty; expected the data"),
    ],
)
def test_load_names_file_and_cause(change: Callable[[bytes], bytes], message: str, full: Path) -> None:
    for name in ("model.safetensors", "optimizer.pt"):
        file = full / name
        stored = file.read_bytes()
        file.write_bytes(change(stored))
        with pytest.raises(ValueError, match=rf"{name} is damaged: {message}"):
            load_checkpoint(full)
        file.write_bytes(stored)
