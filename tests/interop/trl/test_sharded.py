"""TRL training runs under FSDP2 in two processes: measured as by one process, and never changed or ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_on_ranks
from helpers.tolerances import TINY_POLICY, assert_within, exact_bound, rounding_bound
from helpers.trl_runs import PREFIX

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


def assert_training_unchanged(training: dict[str, Any]) -> None:
    plain, measured = training["plain"], training["measured"]
    assert plain["tensors"].keys() == measured["tensors"].keys()
    assert all(torch.equal(plain["tensors"][name], measured["tensors"][name]) for name in plain["tensors"])
    logged = [{name: x for name, x in e.items() if not name.startswith(PREFIX)} for e in measured["log"]]
    assert logged == plain["log"]


def assert_influences_of_one_process(records: list[dict[str, Any]]) -> None:
    [record] = records
    scale = float(record["float64"]["per_sequence"].abs().sum())
    # c is captured in float32.
    assert record["gradient"] <= rounding_bound(torch.float32, TINY_POLICY)
    for name, exact in record["float64"].items():
        bound = exact_bound(record["float32"][name], exact, TINY_POLICY, torch.float32)
        assert bound <= 1e-2 * scale, name
        assert_within(record["sharded"][name], exact, bound, name)


def assert_steps_foretold(history: list[dict[str, float]]) -> None:
    assert [metrics["step"] for metrics in history] == [1, 2]
    for metrics in history:
        size = sum(abs(metrics[name]) for name in ("momentum", "rollouts", "self_influence", "stderr"))
        assert abs(metrics["residual"]) <= rounding_bound(torch.float32, TINY_POLICY, size)
        assert abs(metrics["unattributed"]) <= rounding_bound(torch.float32, TINY_POLICY, size)
        # theta' - theta of weights up to a thousand times as large.
        assert metrics["step_rounding"] <= rounding_bound(torch.float32, 1, 1e3)
        assert (
            abs(metrics["measured"] - metrics["total"]) < 2 * metrics["unexplained_stderr"] <= 2.5 * metrics["stderr"]
        )


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
