"""Trainings in mixed precision: rollouts' gradients are the trainer's own; a step that rounding swallows is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.trl_variants import Variant, policy, trainer
from fx_influence.functional import make_functional
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl.precision import STEP_LOST, in_trainers_precision, rounding_warning, step_rounding

PLAIN = Variant("dapo", False, 1, False, {})
HELD_OUT = ["4+5=", "6=", "70+1=", "1+1+1="]
# Of a product of bfloat16 numbers, each rounded once on the way forward and once back.
BFLOAT16 = torch.finfo(torch.bfloat16).eps


def measured(variant: Variant, out: Path, dtype: torch.dtype, **more: Any) -> list[dict[str, float]]:
    training = trainer(variant, str(out), 2, **more)
    training.model.to(dtype)
    attached = EntropyInfluence(1, HELD_OUT, completions_per_prompt=3).attach(training)
    training.train()
    return attached.history


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [False, True])
def test_unattributed_is_rounding_under_autocast(lora: bool, tmp_path: Path) -> None:
    history = measured(Variant("dapo", lora, 1, False, {}), tmp_path, torch.float32, bf16=True, learning_rate=1e-4)
    assert len(history) == 2
    for figures in history:
        parts = sum(figures[name] for name in ("momentum", "weight_decay", "rollouts", "unattributed"))
        assert figures["total"] == pytest.approx(parts, rel=1e-9)
        signs = abs(figures["positive_advantage"]) + abs(figures["negative_advantage"])
        assert 0 < figures["rounding"] < 1000 * BFLOAT16 * signs
        assert abs(figures["unattributed"]) < 10 * BFLOAT16 * signs
        assert figures["step_rounding"] < STEP_LOST


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_step_that_bfloat16_weights_swallow_is_told_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"of the step is lost to the rounding .* bfloat16.*float32 weights") as told:
        history = measured(
            Variant("dapo", False, 1, False, {}), tmp_path, torch.bfloat16, bf16=True, learning_rate=1e-6
        )
    assert sum("is lost to the rounding" in str(w.message) for w in told) == 1
    assert [figures["step"] for figures in history] == [1, 2]
    assert all(figures["step_rounding"] > 0.5 for figures in history)
    assert all(abs(figures["measured"]) < abs(figures["total"]) for figures in history)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_rounding_is_the_share_of_the_step_not_made(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    theta = {"w": torch.randn(1000, generator=generator).to(dtype)}
    v = {"w": torch.randn(1000, generator=generator)}
    moved = {"w": (theta["w"] + (1e-4 * v["w"]).to(dtype)).float() - theta["w"].float()}
    share = step_rounding(moved, v, 1e-4)
    # A weight of size 1 is rounded by at most half a unit, to a step of 1e-4.
    assert share <= torch.finfo(dtype).eps / 1e-4 if dtype == torch.float32 else share > 0.5
    assert step_rounding(moved, v, 0.0) == 0.0


def test_the_trainers_precision_is_its_accelerators() -> None:
    apply, _ = make_functional(policy())
    scaler = SimpleNamespace(get_scale=lambda: 1024.0)
    plain = SimpleNamespace(mixed_precision="no", native_amp=False)
    bf16 = SimpleNamespace(mixed_precision="bf16", native_amp=True, scaler=None)
    fp16 = SimpleNamespace(mixed_precision="fp16", native_amp=True, scaler=scaler)
    assert in_trainers_precision(apply, plain) is apply
    assert in_trainers_precision(apply, bf16).autocast == (torch.bfloat16, 1.0)
    assert in_trainers_precision(apply, fp16).autocast == (torch.float16, 1024.0)
    assert apply.autocast is None
    assert in_trainers_precision(apply, bf16).with_min_precision().autocast is None


@pytest.mark.parametrize(
    ("dtype", "remedy"), [(torch.bfloat16, "train float32 weights"), (torch.float32, "at this lea")]
)
def test_the_remedy_is_one_that_the_weights_lack(dtype: torch.dtype, remedy: str) -> None:
    said = rounding_warning(3, {"w": torch.ones(1, dtype=dtype)}, 0.25)
    assert said.startswith("step 3: 25% of the step is lost")
    assert f"; {remedy}" in said
