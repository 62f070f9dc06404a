"""TRL training runs under DeepSpeed's ZeRO-3 in two processes: measured as by one process, never changed or ended."""

from __future__ import annotations

from pathlib import Path

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
from fx_influence.interop.trl.prompts import BATCH

pytestmark = pytest.mark.extra


def test_two_ranks_measure_as_one_process_under_zero3(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, "ranks_trl_zero3.py", tmp_path, "measured")
    for case, training in first["measured"].items():
        for each in (training, second["measured"][case]):
            assert_training_unchanged(each)
            assert_steps_add_up(each["history"])
            assert each["history"] == training["history"]
    assert_influences_of_one_process(first["measured"]["full"]["records"])
    stored = fx.load_training(tmp_path / "measured" / "full" / "measured" / "0" / "entropy_influence")
    assert stored.steps["step"].tolist() == [1, 2]


def test_two_ranks_measure_as_one_process_in_bfloat16(tmp_path: Path) -> None:
    """AdamW moves float32 chunks, whose movement is the step's; the layers are gathered from their roundings."""
    first, second = run_on_ranks(2, "ranks_trl_zero3.py", tmp_path, "bfloat16")
    for case, training in first["bfloat16"].items():
        assert_measured_in_bfloat16(training, [training, second["bfloat16"][case]], case != "LoRA")


def test_stage_3_measures_bfloat16_as_stage_2_does(tmp_path: Path) -> None:
    [result] = run_on_ranks(1, "ranks_trl_zero3.py", tmp_path, "bfloat16_single")
    [expected], [actual] = result["bfloat16_single"]["2"], result["bfloat16_single"]["3"]
    for name in ("entropy", "measured", "measured_rounding", "forward_rounding"):
        bound = rounding_bound(torch.float32, TINY_POLICY, max(expected["entropy"], expected["forward_rounding"]))
        assert abs(actual[name] - expected[name]) <= bound, name
    assert abs(expected["measured_rounding"]) > bound


def test_faults_under_zero3_are_one_warning(tmp_path: Path) -> None:
    results = [result["failed"] for result in run_on_ranks(2, "ranks_trl_zero3.py", tmp_path, "failed")]
    for result in results:
        assert_training_unchanged(result)
        assert [metrics["step"] for metrics in result["history"]] == [7]
    assert results[0]["history"] == results[1]["history"]
    assert [result["warnings"] for result in results] == [
        [
            "step 1 is not attributed: on rank 1: ValueError: no rows",
            "step 2 is not attributed: on rank 1: OutOfMemoryError: no memory forward",
            "step 3 is not attributed: on rank 1: OutOfMemoryError: no memory backward",
            "step 4 is not attributed: RuntimeError: no weights",
            "step 5 is not attributed: on rank 1: RuntimeError: no scores",
            "step 6 is not attributed: OSError: no space",
        ],
        [],
    ]


def test_one_process_is_measured_under_zero3(tmp_path: Path) -> None:
    [result] = run_on_ranks(1, "ranks_trl_zero3.py", tmp_path, "single")
    assert_training_unchanged(result["single"])
    assert_steps_add_up(result["single"]["history"])
    held_out, matrix = result["single"]["refusals"]
    assert held_out.startswith("E is 3 held-out prompts and ZeRO-3 shards the model; ")
    assert held_out.endswith(f"Pass eval_prompts={BATCH!r}")
    assert matrix.startswith("matrix is True and ZeRO-3 shards the model; expected False")
