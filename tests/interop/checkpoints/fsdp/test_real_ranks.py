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


@pytest.mark.parametrize(("version", "shape"), [("fsdp2", (2,)), ("fsdp1", (2,)), ("fsdp1", (2, 2))])
def test_load_joins_files_of_ranks(version: str, shape: tuple[int, ...], base: Path, tmp_path: Path) -> None:
    ranks = torch.Size(shape).numel()
    live: dict[str, Any] = run_on_ranks(ranks, "ranks_rank_files.py", tmp_path, base, version, *shape)[0]
    huggingface = tmp_path / "actor" / "huggingface"
    huggingface.mkdir()
    for file in base.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, huggingface)
    loaded = load_checkpoint(tmp_path)
    assert loaded.path == tmp_path / "actor"
    weights, state = loaded.model.state_dict(), present(loaded.optimizer_state)
    assert weights.keys() == live["weights"].keys()
    assert all(torch.equal(weights[name], value) for name, value in live["weights"].items())
    assert state.exp_avg.keys() == live["state"].keys()
    for name, entry in live["state"].items():
        assert torch.equal(state.exp_avg[name], entry["exp_avg"])
        assert torch.equal(state.exp_avg_sq[name], entry["exp_avg_sq"])
        assert state.step[name] == entry["step"] == 2
    assert (state.lr, {hyper.weight_decay for hyper in state.hyper.values()}) == (1e-2, {0.1})
    assert not any(torch.equal(a, b) for a in state.exp_avg.values() for b in state.exp_avg.values() if a is not b)
