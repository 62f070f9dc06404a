"""TRL training runs under FSDP2 in two processes: measured as by one process, and never changed or ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_on_ranks
from helpers.sharded_results import (
    assert_influences_of_one_process,
    assert_steps_foretold,
    assert_training_unchanged,
)

import fx_influence as fx


@pytest.mark.slow
def test_two_sharded_ranks_measure_as_one_process(tmp_path: Path) -> None:
    results = run_on_ranks(2, "ranks_trl_sharded.py", tmp_path)
    for result in results:
        assert result["measured"]["sharded"]
        for training in ("measured", "failed"):
            assert_training_unchanged(result[training])
        assert_influences_of_one_process(result["measured"]["records"])
        assert_steps_foretold(result["measured"]["history"])
        assert_mixed_precision_is_the_trainers(result["mixed"])
    assert results[0]["measured"]["history"] == results[1]["measured"]["history"]
    assert_faults_are_one_warning(results)
    assert_refusal_ends_measuring_on_all(results)
    stored = fx.load_training(tmp_path / "measured" / "measured" / "0" / "entropy_influence")
    assert stored.steps["step"].tolist() == [1, 2]
    assert stored.steps["total"].tolist() == [metrics["total"] for metrics in results[0]["measured"]["history"]]
    # From the number of updates and beta1 = 0.9 alone: (1 - beta1^step) / (1 - beta1).
    assert stored.steps["lifetime_factor"].tolist() == pytest.approx([1.0, 1.9])


def assert_mixed_precision_is_the_trainers(mixed: dict[str, Any]) -> None:
    assert mixed["dtypes"] == ["torch.bfloat16"]
    [metrics] = mixed["history"]
    signs = abs(metrics["positive_advantage"]) + abs(metrics["negative_advantage"])
    # A product of bfloat16 numbers, each rounded once on the way forward and once on the way back.
    assert abs(metrics["unattributed"]) < 10 * torch.finfo(torch.bfloat16).eps * signs


def assert_faults_are_one_warning(results: list[Any]) -> None:
    """Treat a failure of one rank inside a pass over the units as one of both, with training going on."""
    for result in results:
        assert [metrics["step"] for metrics in result["failed"]["history"]] == [7]
    assert results[0]["failed"]["history"] == results[1]["failed"]["history"]
    assert results[0]["failed"]["warnings"] == [
        "step 1 is not attributed: on rank 1: ValueError: no rows",
        "step 2 is not attributed: on rank 1: OutOfMemoryError: no memory forward",
        "step 3 is not attributed: on rank 1: OutOfMemoryError: no memory backward",
        "step 4 is not attributed: RuntimeError: no weights",
        "step 5 is not attributed: on rank 1: RuntimeError: no scores",
        "step 6 is not attributed: OSError: no space",
    ]
    assert not results[1]["failed"]["warnings"]


def assert_refusal_ends_measuring_on_all(results: list[Any]) -> None:
    for result in results:
        assert result["refused"]["steps"] == 1
        assert not result["refused"]["history"]
    text = "no step of this training run is measured: on rank 1: ValueError: no shards"
    assert [result["refused"]["warnings"] for result in results] == [[text], []]
