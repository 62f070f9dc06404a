"""Training runs in mixed precision: influences are in the trainer's precision; steps lost to rounding give a
warning."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.trl_runs import PLAIN, measure_training

from benchmarks.trl.variants import Variant, policy, trainer
from fx_influence.functional import make_functional
from fx_influence.interop.live.precision import MAX_STEP_ROUNDING
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl.precision import in_trainers_precision

SETTINGS: dict[str, Any] = {"eval_prompts": ["4+5=", "6=", "70+1=", "1+1+1="], "completions_per_prompt": 3}
# A product of bfloat16 numbers, each rounded once on the way forward and once on the way back.
BFLOAT16 = torch.finfo(torch.bfloat16).eps


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [False, True])
def test_unattributed_is_rounding_under_autocast(lora: bool, tmp_path: Path) -> None:
    variant = Variant("dapo", lora, 1, False, {})
    history = measure_training(tmp_path, 2, variant, settings=SETTINGS, bf16=True, learning_rate=1e-4).history
    assert len(history) == 2
    for metrics in history:
        parts = sum(metrics[name] for name in ("momentum", "weight_decay", "rollouts", "unattributed"))
        assert metrics["total"] == pytest.approx(parts, rel=1e-9)
        signs = abs(metrics["positive_advantage"]) + abs(metrics["negative_advantage"])
        assert 0 < metrics["rounding"] < 1000 * BFLOAT16 * signs
        assert abs(metrics["unattributed"]) < 10 * BFLOAT16 * signs
        assert metrics["step_rounding"] < MAX_STEP_ROUNDING


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_step_lost_to_bfloat16_weights_is_warned_of_once(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 2, bf16=True, learning_rate=1e-6)
    training.model.to(torch.bfloat16)
    influence = EntropyInfluence(1, **SETTINGS).attach(training)
    with pytest.warns(UserWarning, match=r"of the step is lost to the rounding .* bfloat16.*float32 weights") as caught:
        training.train()
    assert sum("is lost to the rounding" in str(w.message) for w in caught) == 1
    assert [metrics["step"] for metrics in influence.history] == [1, 2]
    assert all(metrics["step_rounding"] > 0.5 for metrics in influence.history)
    assert all(abs(metrics["measured"]) < abs(metrics["total"]) for metrics in influence.history)


def test_policy_runs_in_the_accelerators_precision() -> None:
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
