"""TRL training runs under DeepSpeed's ZeRO-1 and 2: measured as by one process, and never changed or ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_on_ranks
from helpers.sharded_results import (
    assert_influences_of_one_process,
    assert_measured_in_bfloat16,
    assert_steps_add_up,
    assert_training_unchanged,
)
from helpers.tolerances import TINY_POLICY, rounding_bound

import fx_influence as fx

pytestmark = pytest.mark.extra


def test_two_ranks_measure_as_one_process_under_zero(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, "ranks_trl_zero.py", tmp_path, "measured")
    for case, training in first["measured"].items():
        for each in (training, second["measured"][case]):
            assert_training_unchanged(each)
            assert_steps_add_up(each["history"])
            assert each["history"] == training["history"]
            if "DeepSpeed" not in case:
                assert_influences_of_one_process(each["records"])
    stored = fx.load_training(tmp_path / "measured" / "ZeRO-2" / "measured" / "0" / "entropy_influence")
    assert stored.steps["step"].tolist() == [1, 2]


def test_two_ranks_measure_as_one_process_in_bfloat16(tmp_path: Path) -> None:
    """AdamW moves float32 weights, whose movement is the step's; the forward has their roundings to bfloat16."""
    first, second = run_on_ranks(2, "ranks_trl_zero.py", tmp_path, "bfloat16")
    optimizers = set()
    for case, training in first["bfloat16"].items():
        optimizers.add(training["optimizer"])
        assert_measured_in_bfloat16(training, [training, second["bfloat16"][case]], "LoRA" not in case)
    assert optimizers == {"DeepSpeedZeroOptimizer", "BF16_Optimizer"}


def test_measured_rounding_is_the_rest_of_the_step(tmp_path: Path) -> None:
    [result] = run_on_ranks(1, "ranks_trl_zero.py", tmp_path, "bfloat16_single")
    training = result["bfloat16_single"]
    assert_training_unchanged(training)
    for metrics, unrounded in zip(training["history"], training["unrounded"], strict=True):
        rest = metrics["measured"] - metrics["measured_rounding"]
        bound = rounding_bound(torch.float32, TINY_POLICY, metrics["entropy"])
        assert abs(rest - unrounded) <= bound < abs(metrics["measured_rounding"])


def test_two_ranks_measure_held_out_prompts_under_zero(tmp_path: Path) -> None:
    results = [result["held_out"] for result in run_on_ranks(2, "ranks_trl_zero.py", tmp_path, "held_out")]
    for result in results:
        assert_training_unchanged(result)
        assert [metrics["step"] for metrics in result["history"]] == [1, 2]
        gaps = [gap for by_name in result["gaps"] for gap in by_name.values()]
        assert max(gaps) <= rounding_bound(torch.float32, TINY_POLICY)
    assert results[0]["history"] == results[1]["history"]


def test_faults_under_zero_are_one_warning(tmp_path: Path) -> None:
    results = run_on_ranks(2, "ranks_trl_zero.py", tmp_path, "failed", "refused")
    for result in results:
        assert_training_unchanged(result["failed"])
        assert [metrics["step"] for metrics in result["failed"]["history"]] == [5]
        assert result["refused"]["steps"] == 1
        assert not result["refused"]["history"]
        assert result["refused"]["refusal"].startswith("zero_optimization.zero_hpz_partition_size is 2 in DeepSpeed's ")
    assert results[0]["failed"]["history"] == results[1]["failed"]["history"]
    assert warnings_by_rank(results, "failed") == [
        [
            "step 1 is not attributed: on rank 1: ValueError: no rows",
            "step 2 is not attributed: on rank 1: OutOfMemoryError: no memory",
            "step 3 is not attributed: on rank 1: RuntimeError: no scores",
            "step 4 is not attributed: OSError: no space",
        ],
        [],
    ]
    text = "no step of this training run is measured: on rank 1: ValueError: no partitions"
    assert warnings_by_rank(results, "refused") == [[text], []]


def test_one_process_is_measured_under_zero(tmp_path: Path) -> None:
    [result] = run_on_ranks(1, "ranks_trl_zero.py", tmp_path, "single")
    assert_training_unchanged(result["single"])
    assert_steps_add_up(result["single"]["history"])


def warnings_by_rank(results: list[Any], run: str) -> list[list[str]]:
    return [result[run]["warnings"] for result in results]
