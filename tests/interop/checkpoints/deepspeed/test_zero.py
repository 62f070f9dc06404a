"""DeepSpeed checkpoints of ZeRO-1, 2 and 3, rebuilt after its source or saved by it, against their training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_models import assert_same_weights
from helpers.deepspeed_files import write_zero
from helpers.present import present
from helpers.ranks import run_on_ranks
from torch import nn
from transformers import AutoModelForCausalLM

from fx_influence.interop.checkpoints.load import load_checkpoint
from fx_influence.interop.optimizers import adamw_state


def trained(model: nn.Module) -> torch.optim.AdamW:
    """Return an AdamW of two groups, as transformers' Trainer makes, after two steps of random gradients."""
    generator = torch.Generator().manual_seed(3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if (p.ndim == 1) == flat], "weight_decay": decay}
        for flat, decay in ((False, 0.1), (True, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return optimizer


@pytest.fixture
def live(bases: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(bases / "qwen2")


def assert_state(loaded: Any, optimizer: torch.optim.AdamW, model: nn.Module) -> None:
    """Assert that the loaded state is the live one to the bit, whatever the order of the names."""
    actual, expected = present(loaded), adamw_state(optimizer, model)
    assert (actual.step, actual.hyper, actual.lr) == (expected.step, expected.hyper, expected.lr)
    for name in expected.exp_avg:
        assert torch.equal(actual.exp_avg[name], expected.exp_avg[name])
        assert torch.equal(actual.exp_avg_sq[name], expected.exp_avg_sq[name])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("stage", "ranks", "sub_group"), [(1, 2, 0), (2, 3, 0), (2, 1, 0), (3, 2, 200), (3, 3, 10**9)])
def test_load_joins_partitions(
    stage: int, ranks: int, sub_group: int, fused: bool, live: Any, bases: Path, tmp_path: Path
) -> None:
    optimizer = trained(live)
    write_zero(tmp_path, live, optimizer, stage, ranks, fused=fused, sub_group=sub_group)
    loaded = load_checkpoint(tmp_path, base=bases / "qwen2")
    assert_same_weights(loaded.model, live)
    assert_state(loaded.optimizer_state, optimizer, live)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_load_joins_frozen_parameters(stage: int, live: Any, bases: Path, tmp_path: Path) -> None:
    frozen = [name for name, _ in live.named_parameters() if "layers.0" in name]
    for name in frozen:
        live.get_parameter(name).requires_grad_(False)
        if stage == 1:  # ZeRO-1 has them in the module's own state alone, in the precision of the training
            live.get_parameter(name).data = live.get_parameter(name).data.bfloat16().float()
    optimizer = trained(live)
    write_zero(tmp_path, live, optimizer, stage, 2, frozen=frozen)
    loaded = load_checkpoint(tmp_path, base=bases / "qwen2")
    assert all(torch.equal(p, loaded.model.get_parameter(name)) for name, p in live.named_parameters())
    assert set(present(loaded.optimizer_state).exp_avg) >= set(adamw_state(optimizer, live).exp_avg)


@pytest.mark.extra
def test_load_reads_what_deepspeed_saves(tmp_path: Path) -> None:
    """Checkpoints of TRL's training under ZeRO-1 and 2 in two processes, saved by DeepSpeed itself."""
    [trained, _] = run_on_ranks(2, "ranks_trl_zero.py", tmp_path, "saved")
    for stage, expected in trained["saved"].items():
        folder = tmp_path / "saved" / f"stage{stage}"
        loaded = load_checkpoint(folder, base=tmp_path / "saved" / f"training{stage}" / "0" / "policy")
        weights = dict(loaded.model.named_parameters())
        assert all(torch.equal(weights[name], p) for name, p in expected["weights"].items())
        state = present(loaded.optimizer_state)
        assert {state.step[name] for name in weights} == {2}
        for name in weights:
            assert torch.equal(state.exp_avg[name], expected["exp_avg"][name])
            assert torch.equal(state.exp_avg_sq[name], expected["exp_avg_sq"][name])


CHANGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "missing rank": (
        lambda d: (d / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink(),
        FileNotFoundError,
        r"of the ranks \[1, 2\], without 0; expected one of each rank",
    ),
    "missing last rank": (
        lambda d: (d / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink(),
        ValueError,
        r"partition_count in .*rank_0_mp_rank_00_optim_states\.pt is \[3, 3\]; expected 2",
    ),
    "missing model": (
        lambda d: (d / "mp_rank_00_model_states.pt").unlink(),
        FileNotFoundError,
        "global_step2 has no file .*model_states",
    ),
    "git-lfs": (
        lambda d: (d / "mp_rank_00_model_states.pt").write_text("version https://git-lfs.github.com/spec/v1\n"),
        ValueError,
        r"mp_rank_00_model_states\.pt is damaged: a pointer of git-lfs.*git lfs pull",
    ),
    "cut off": (
        lambda d: (d / "mp_rank_00_model_states.pt").write_bytes((d / "mp_rank_00_model_states.pt").read_bytes()[:900]),
        ValueError,
        r"mp_rank_00_model_states\.pt is damaged: cut off after 900 bytes",
    ),
    "tensor parallel": (
        lambda d: (d / "mp_rank_01_model_states.pt").write_bytes(b""),
        ValueError,
        r"mp_rank_01_model_states\.pt is of tensor parallelism",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_load_names_file_that_cannot_be_used(change: str, live: Any, bases: Path, tmp_path: Path) -> None:
    directory = write_zero(tmp_path, live, trained(live), 2, 3)
    spoil, error, message = CHANGES[change]
    spoil(directory)
    with pytest.raises(error, match=message):
        load_checkpoint(tmp_path, base=bases / "qwen2")


def test_load_refuses_partitions_of_another_model(live: Any, bases: Path, tmp_path: Path) -> None:
    directory = write_zero(tmp_path, live, trained(live), 2, 2)
    file = directory / "mp_rank_00_model_states.pt"
    saved = torch.load(file, weights_only=False)
    saved["param_shapes"][0]["model.embed_tokens.weight"] = torch.Size((90, 8))
    torch.save(saved, file)
    with pytest.raises(ValueError, match=r"exp_avg in .*global_step2, parameter group 0 has partitions of \["):
        load_checkpoint(tmp_path, base=bases / "qwen2")


def test_load_refuses_adam_with_coupled_decay(live: Any, bases: Path, tmp_path: Path) -> None:
    config = {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}}}
    write_zero(tmp_path, live, trained(live), 1, 1, config=config)
    with pytest.raises(TypeError, match="adam_w_mode=false; expected AdamW"):
        load_checkpoint(tmp_path, base=bases / "qwen2")
