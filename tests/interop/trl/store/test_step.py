"""A measured step is stored as a run directory, which is read, reported and repeated as any other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding, rounding_bound
from helpers.trl_runs import HELD_OUT, measure_training

import fx_influence as fx
from benchmarks.trl.variants import PROMPTS, Variant, reward
from fx_influence.lab.cli import main
from fx_influence.lab.plan.files import read_plan

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]
ON_TWELVE = {"eval_prompts": [*HELD_OUT, "1+1+1="], "completions_per_prompt": 3}


def test_stored_step_is_a_readable_run(tmp_path: Path) -> None:
    variant = Variant("dapo", False, 2, False, {"entropy_coef": 0.05})
    metrics = measure_training(tmp_path, 2, variant, settings=ON_TWELVE).history[1]
    results, lr = fx.load_run(tmp_path / "entropy_influence" / "step_000002"), metrics["lr"]
    assert_close_to_rounding(results.summary["total"] * lr, metrics["total"], terms=2)
    assert results.summary["in_this_step"]["measured"] == metrics["measured"]
    arrays = results.evaluations[0].arrays
    scale = np.abs(arrays["per_token"]).sum()
    summed: dict[str, Any] = {"terms": arrays["per_token"].size, "dtype": torch.float32}
    assert_close_to_rounding(arrays["per_sequence"].sum() * lr, metrics["rollouts"], scale=scale * lr, **summed)
    assert_close_to_rounding(arrays["per_token"].sum(1), arrays["per_sequence"], scale=scale, **summed)
    assert arrays["full"].tolist() == [metrics["measured"]]
    assert set(results.tokens) == {"logprobs", "entropies", "coefficients", "entropy_coefficients"}
    for name, stored in (("logprobs", "behaviour_logprobs"), ("coefficients", "coefficients")):
        for row, rollout in zip(results.tokens[name], results.update_rollouts, strict=True):
            completion = row[len(rollout.prompt_ids) :][: len(rollout.completion_ids)]
            expected = getattr(rollout, stored)
            assert_close_to_rounding(completion, expected, terms=TINY_POLICY, dtype=torch.float32)
    assert (results.tokens["entropies"] >= 0).all()
    assert [record["influence"] for record in results.sequences] == arrays["per_sequence"].tolist()
    assert len(results.update_rollouts) == 12
    assert len(results.evaluations[0].rollouts) == 12
    for record, rollout in zip(results.sequences, results.update_rollouts, strict=True):
        assert rollout.prompt in PROMPTS
        assert rollout.reward == pytest.approx(reward([rollout.completion])[0])
        assert rollout.advantage is not None
        assert rollout.coefficients is not None
        assert len(record["tokens"]) == len(rollout.completion_ids) == len(rollout.coefficients)
    advantages = sum(r.advantage or 0.0 for r in results.update_rollouts)
    assert_close_to_rounding(advantages, 0.0, terms=12, scale=12, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_stored_state_repeats_the_step_from_its_plan(lora: bool, tmp_path: Path) -> None:
    """Off-policy, with an entropy bonus and clipping: what is stored of U is enough without the trainer's loss."""
    variant = Variant("grpo", lora, 3, True, {"entropy_coef": 0.05})
    settings = {"completions_per_prompt": 3, "save_state": True, "matrix": True}
    measure_training(tmp_path, 2, variant, settings=settings, learning_rate=1e-3)
    path = tmp_path / "entropy_influence" / "step_000002"
    live = fx.load_run(path)
    plan = dataclasses.replace(read_plan(path / "plan.yaml", fx.lab.EntropyInfluencePlan), dtype="float32")
    again = fx.lab.run(plan, tmp_path / "again")
    assert again.summary["lr"] == live.summary["lr"]
    matrix = live.evaluations[0].matrix
    assert matrix is not None
    scale = np.abs(matrix).sum() + abs(live.summary["momentum"]) + abs(live.summary["weight_decay"])
    rounding: dict[str, Any] = {"terms": TINY_POLICY, "dtype": torch.float32}
    for name in ("total", "momentum", "weight_decay", "sum_per_sequence", "total_stderr"):
        assert_close_to_rounding(again.summary[name], live.summary[name], scale=scale, name=name, **rounding)
    stored, repeated = live.evaluations[0].arrays, again.evaluations[0].arrays
    for name in ("per_sequence", "per_token"):
        assert_close_to_rounding(stored[name], repeated[name], scale=scale, name=name, **rounding)
    assert_close_to_rounding(matrix, again.evaluations[0].matrix, scale=scale, **rounding)
    # m / den of a gradient that is nearly 0 is rounded as coarsely as that gradient is beside the others.
    before, after = (torch.cat([x.flatten() for x in run.baseline().values()]) for run in (live, again))
    assert (after - before).norm() <= rounding_bound(torch.float32, TINY_POLICY, before.norm())


def test_report_prints_a_measured_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = measure_training(tmp_path, 1, settings=ON_TWELVE).history
    assert main(["report", str(tmp_path / "entropy_influence" / "step_000001")]) == 0
    page = capsys.readouterr().out
    assert "Step 1 of a training" in page
    assert f"{history[0]['measured']:.4g}" in page
