"""TRL training runs in two processes: rollouts add up to the averaged gradient, and measuring changes nothing."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_on_ranks
from helpers.ranks_trl import SOURCES
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding, assert_within, exact_bound, rounding_bound
from helpers.trl_runs import HELD_OUT, PREFIX, assert_logged

import fx_influence as fx
from benchmarks.trl.variants import PROMPTS, reward
from fx_influence.interop.live.metrics import REGION_METRICS
from fx_influence.lab.plan.files import read_plan

ACCELERATE = (
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes=2",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--main_process_port=0",
)
"""Command that starts two processes; ``--multi_gpu`` alone makes ``accelerate launch`` do so on the CPU."""


@pytest.mark.slow
def test_two_ranks_add_up_to_gradient_and_step(tmp_path: Path) -> None:
    for result in run_on_ranks(2, "ranks_trl.py", tmp_path, "losses"):
        assert len(result) == 36, "every loss twice, full and LoRA"
        for name, errors in result.items():
            assert errors["tokens"] > 0, name
            assert errors["gradient"] <= rounding_bound(torch.float32, TINY_POLICY), name
            # theta' - theta of weights up to a thousand times as large.
            assert errors["step"] <= rounding_bound(torch.float32, 1, 1e3), name


@pytest.mark.slow
def test_two_ranks_measure_as_one_process(tmp_path: Path) -> None:
    results = run_on_ranks(2, "ranks_trl.py", tmp_path, "measured", launcher=ACCELERATE)
    for training, steps in (("measured", 3), ("failed", 4)):
        assert_training_unchanged(results, training, steps)
    assert_logs_equal(results)
    assert_rollouts_of_all_ranks(results, tmp_path)
    assert_stored_once(tmp_path)
    assert_plan_repeats_step(tmp_path)
    assert_sums_match_one_process(results)
    assert_refused_step_ends_nothing(results)
    assert_failures_reach_all_ranks(results)


def assert_training_unchanged(results: list[Any], training: str, steps: int) -> None:
    for result in results:
        plain, measured = result[training]["weights"]
        assert all(torch.equal(plain[name], measured[name]) for name in plain)
        plain, measured = result[training]["log"]
        assert len(plain) == steps + 1
        assert [{name: x for name, x in e.items() if not name.startswith(PREFIX)} for e in measured] == plain


def assert_logs_equal(results: list[Any]) -> None:
    first, second = (result["measured"] for result in results)
    assert first["history"] == second["history"]
    assert first["log"] == second["log"]
    assert [metrics["step"] for metrics in first["history"]] == [1, 2, 3]
    largest = max(abs(metrics["total"]) for metrics in first["history"])
    for entry, metrics in zip(first["log"][1], first["history"], strict=False):
        assert_logged(entry, metrics)
        assert metrics["unattributed"] == 0
        assert metrics["measured"] == pytest.approx(metrics["total"], abs=0.1 * largest)
        assert 8 < metrics["ess"] <= 9
        parts = [metrics[name] for name in ("momentum", "weight_decay", "rollouts", "unattributed")]
        scale = sum(abs(part) for part in parts)
        assert_close_to_rounding(metrics["total"], sum(parts), terms=TINY_POLICY, scale=scale, dtype=torch.float32)


def assert_rollouts_of_all_ranks(results: list[Any], out: Path) -> None:
    for result in results:
        bound = rounding_bound(torch.float32, TINY_POLICY)
        assert [max(gaps.values()) <= bound for gaps in result["measured"]["gaps"]] == [True] * 3
        sampled = result["measured"]["sampled"]
        assert len(sampled) == 12
        assert sampled[:6] != sampled[6:]
        assert sampled == results[0]["measured"]["sampled"]
    run = fx.load_run(step_path(out, 2))
    evaluation, update = run.evaluations[0].rollouts, run.update_rollouts
    assert [r.prompt for r in evaluation] == [prompt for prompt in HELD_OUT for _ in range(3)]
    assert [r.group for r in evaluation] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(update) == 12
    prompts_and_ranks: dict[int, set[tuple[str, bool]]] = defaultdict(set)
    advantages: dict[int, list[float]] = defaultdict(list)
    for k, rollout in enumerate(update):
        assert rollout.group is not None
        assert rollout.advantage is not None
        prompts_and_ranks[rollout.group].add((rollout.prompt, k < 6))
        advantages[rollout.group].append(rollout.advantage)
        assert rollout.reward == pytest.approx(reward([rollout.completion])[0])
        assert rollout.source == SOURCES[rollout.prompt]
    # Each group has one prompt, and one group has rollouts of both ranks.
    assert all(len({prompt for prompt, _ in group}) == 1 for group in prompts_and_ranks.values())
    assert sorted(len(group) for group in prompts_and_ranks.values()) == [1, 1, 2]
    assert {prompt for group in prompts_and_ranks.values() for prompt, _ in group} <= set(PROMPTS)
    for values in advantages.values():
        assert len(values) == 4
        assert abs(sum(values)) <= rounding_bound(torch.float32, 4, values)


def assert_stored_once(out: Path) -> None:
    expected = ("failed/measured/0", [4]), ("measured/0", [1, 2, 3]), ("refused/0", [2]), ("summed/0", [1, 2])
    paths = [step_path(out, step, training) for training, steps in expected for step in steps]
    assert sorted(out.rglob("*step_*")) == paths
    assert {path.parent for path in paths} == set(out.rglob("entropy_influence"))
    for training, steps in expected:
        ledger = fx.load_training(step_path(out, steps[0], training).parent)
        assert ledger.steps["step"].tolist() == steps
        stored = [fx.load_run(step_path(out, step, training)).summary["in_this_step"]["total"] for step in steps]
        assert ledger.steps["total"].tolist() == stored


def assert_plan_repeats_step(out: Path) -> None:
    plan = read_plan(step_path(out, 2) / "plan.yaml", fx.lab.EntropyInfluencePlan)
    live = fx.load_run(step_path(out, 2))
    again, rounded = (
        fx.lab.run(dataclasses.replace(plan, dtype=dtype), out / dtype) for dtype in ("float64", "float32")
    )
    scale = sum(abs(record["influence"]) for record in live.sequences)
    for name in ("total", "momentum", "weight_decay", "sum_per_sequence", "total_stderr"):
        bound = rounding_bound(torch.float32, TINY_POLICY, scale)
        assert_within(again.summary[name], live.summary[name], bound, name)
    for name in ("per_sequence", "per_token", "matrix"):
        measured, exact, in_float32 = (arrays_of(run)[name] for run in (live, again, rounded))
        # The training is in float32, whose rounding this step shows: half of all influence is one rollout's.
        bound = exact_bound(in_float32, exact, TINY_POLICY, torch.float32)
        assert bound <= 1e-2 * scale, name
        assert_within(measured, exact, bound, name)


def assert_sums_match_one_process(results: list[Any]) -> None:
    first, second = (result["summed"]["history"] for result in results)
    assert first == second
    assert len(first) == 2
    for metrics, (lr, influence, stderr, size) in zip(first, results[0]["summed"]["expected"], strict=True):
        bound = rounding_bound(torch.float32, TINY_POLICY, lr * size)
        for k, name in enumerate(REGION_METRICS):
            assert_within(metrics[name], lr * influence[k], bound, name)
            if f"{name}_stderr" in metrics:
                assert_within(metrics[f"{name}_stderr"], lr * stderr[k], bound, name)
        assert any(f"{name}_stderr" in metrics for name in REGION_METRICS)


def arrays_of(run: Any) -> dict[str, Any]:
    evaluation = run.evaluations[0]
    return {**evaluation.arrays, "matrix": evaluation.matrix}


def assert_refused_step_ends_nothing(results: list[Any]) -> None:
    for result in results:
        disagreement = result["refused"]["disagreement"]
        assert re.match(r"eval_prompts is \['4\+5=', .* on rank 0 and \['6=', .* on", disagreement)
        assert result["refused"]["steps"] == 2
        assert [metrics["step"] for metrics in result["refused"]["history"]] == [2]
    warnings = [result["refused"]["warnings"] for result in results]
    assert warnings == [["step 1 is not attributed: the residual is 0.5"], []]


def assert_failures_reach_all_ranks(results: list[Any]) -> None:
    """Treat a failure on one rank as one on both, neither of which waits for the other; the first rank warns."""
    for result in results:
        assert [metrics["step"] for metrics in result["failed"]["history"]] == [4]
    assert results[0]["failed"]["history"] == results[1]["failed"]["history"]
    assert results[0]["failed"]["warnings"] == [
        "step 1 is not attributed: on rank 1: RuntimeError: no kernel",
        "step 2 is not attributed: on rank 1: OutOfMemoryError: no memory",
        "step 3 is not attributed: OSError: no space",
    ]
    assert not results[1]["failed"]["warnings"]


def step_path(out: Path, step: int, training: str = "measured/0") -> Path:
    return out / training / "entropy_influence" / f"step_{step:06d}"
