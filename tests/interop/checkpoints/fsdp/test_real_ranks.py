"""Files of ranks that FSDP1 and FSDP2 really write, against what torch gathers from the same ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_models import CONFIGS, make_tokenizer
from helpers.present import present
from helpers.ranks import run_on_ranks
from helpers.versions import TORCH
from transformers import AutoModelForCausalLM

from fx_influence.interop.checkpoints.load import load_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(TORCH < (2, 6), reason="fully_shard is public from torch 2.6"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tied model whose rows the ranks cannot share evenly."""
    path = tmp_path_factory.mktemp("base")
    config = CONFIGS["qwen2"]()
    config.vocab_size = 13
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


TWO_RANKS = (
    "fsdp2",
    "fsdp1",
    "fsdp1-orig",
    "fsdp1-group",
    "fsdp1-group-named",
    "fsdp1-lora",
    "fsdp1-lora-orig",
    "fsdp1-lora-group",
    "fsdp1-lora-only",
    "fsdp2-lora",
)


@pytest.fixture(scope="module")
def two_ranks(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the directory of trainings on two ranks, and what torch gathers from each."""
    path = tmp_path_factory.mktemp("two_ranks")
    return path, run_on_ranks(2, "ranks_rank_files.py", path, base, ",".join(TWO_RANKS), 2)[0]


def assert_loaded(path: Path, base: Path, live: dict[str, Any], directory: Path | None = None) -> None:
    """Assert that a training run's files give what torch has gathered, bit for bit.

    Args:
        path: directory above the actor's.
        base: directory of the base model, whose config and tokenizer verl puts beside the files.
        live: complete weights and states of the training run.
        directory: the argument ``base`` of ``load_checkpoint``.
    """
    huggingface = path / "actor" / "huggingface"
    huggingface.mkdir(exist_ok=True)
    for file in base.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, huggingface)
    loaded = load_checkpoint(path, base=directory)
    assert loaded.path == path / "actor"
    weights, state = loaded.model.state_dict(), present(loaded.optimizer_state)
    assert weights.keys() == live["weights"].keys()
    assert all(torch.equal(weights[name], value) for name, value in live["weights"].items())
    trainable = {name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    assert state.exp_avg.keys() == live["state"].keys() == trainable
    for name, entry in live["state"].items():
        assert torch.equal(state.exp_avg[name], entry["exp_avg"])
        assert torch.equal(state.exp_avg_sq[name], entry["exp_avg_sq"])
        assert state.step[name] == entry["step"] == 2
    assert (state.lr, {hyper.weight_decay for hyper in state.hyper.values()}) == (1e-2, {0.1})
    assert not any(torch.equal(a, b) for a in state.exp_avg.values() for b in state.exp_avg.values() if a is not b)


@pytest.mark.parametrize("variant", TWO_RANKS)
def test_load_joins_files_of_two_ranks(variant: str, base: Path, two_ranks: tuple[Path, dict[str, Any]]) -> None:
    path, live = two_ranks
    assert_loaded(path / variant, base, live[variant], base if "only" in variant else None)


@pytest.mark.parametrize("variant", ["fsdp1", "fsdp1-orig"])
def test_load_joins_files_of_replicated_shards(variant: str, base: Path, tmp_path: Path) -> None:
    live = run_on_ranks(4, "ranks_rank_files.py", tmp_path, base, variant, 2, 2)[0]
    assert_loaded(tmp_path / variant, base, live[variant])
