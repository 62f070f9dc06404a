"""TRL trainings in two processes: their rollouts add up to the averaged gradient, measuring them changes nothing."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_on_ranks
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding, assert_within, exact_bound, rounding_bound

import fx_influence as fx
from benchmarks.trl_variants import PROMPTS, reward
from fx_influence.lab.plan import read_plan

OURS = "entropy_influence/"
HELD_OUT = ["4+5=", "6=", "70+1="]

ACCELERATE = (
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes=2",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--main_process_port=0",
)
"""On the CPU ``accelerate launch`` starts two processes by that flag alone."""


def add_up(answer: dict[str, dict[str, float]], count: int) -> None:
    assert len(answer) == count
    for name, errors in answer.items():
        assert errors["tokens"] > 0, name
        assert errors["gradient"] <= rounding_bound(torch.float32, TINY_POLICY), name
        # theta' - theta of weights up to a thousand times as large
        assert errors["step"] <= rounding_bound(torch.float32, 1, 1e3), name


@pytest.mark.slow
def test_rollouts_of_two_ranks_add_up_to_the_averaged_gradient_and_its_step(tmp_path: Path) -> None:
    for answer in run_on_ranks(2, "ranks_trl.py", tmp_path, "losses"):
        add_up(answer, 18)


@pytest.mark.slow
def test_rollouts_of_two_ranks_add_up_for_every_variant(tmp_path: Path) -> None:
    for answer in run_on_ranks(2, "ranks_trl.py", tmp_path, "sweep"):
        add_up(answer, 36)


@pytest.mark.slow
def test_a_training_of_two_ranks_is_measured_as_by_one_process(tmp_path: Path) -> None:
    found = run_on_ranks(2, "ranks_trl.py", tmp_path, "measured", launcher=ACCELERATE)
    for training, steps in (("measured", 3), ("failed", 4)):
        unchanged(found, training, steps)
    logged_alike(found)
    of_all_rollouts(found, tmp_path)
    written_once(tmp_path)
    repeated(tmp_path)
    gone_on(found)
    failed_together(found)


def unchanged(found: list[Any], training: str, steps: int) -> None:
    for answer in found:
        plain, measured = answer[training]["weights"]
        assert all(torch.equal(plain[name], measured[name]) for name in plain)
        plain, measured = answer[training]["log"]
        assert len(plain) == steps + 1
        assert [{name: x for name, x in e.items() if not name.startswith(OURS)} for e in measured] == plain


def logged_alike(found: list[Any]) -> None:
    first, second = (answer["measured"] for answer in found)
    assert first["history"] == second["history"]
    assert first["log"] == second["log"]
    assert [figures["step"] for figures in first["history"]] == [1, 2, 3]
    largest = max(abs(figures["total"]) for figures in first["history"])
    for entry, figures in zip(first["log"][1], first["history"], strict=False):
        assert all(entry[OURS + name] == value for name, value in figures.items() if name != "step")
        assert figures["unattributed"] == 0
        assert figures["measured"] == pytest.approx(figures["total"], abs=0.1 * largest)
        assert 8 < figures["ess"] <= 9
        parts = [figures[name] for name in ("momentum", "weight_decay", "rollouts", "unattributed")]
        size = sum(abs(part) for part in parts)
        assert_close_to_rounding(figures["total"], sum(parts), terms=TINY_POLICY, scale=size, dtype=torch.float32)


def of_all_rollouts(found: list[Any], out: Path) -> None:
    for answer in found:
        bound = rounding_bound(torch.float32, TINY_POLICY)
        assert [max(gaps.values()) <= bound for gaps in answer["measured"]["gaps"]] == [True] * 3
        drawn = answer["measured"]["drawn"]
        assert len(drawn) == 12
        assert drawn[:6] != drawn[6:]
        assert drawn == found[0]["measured"]["drawn"]
    results = fx.load_run(stored(out, 2))
    e, u = results.evaluations[0].rollouts, results.update_rollouts
    assert [r.prompt for r in e] == [prompt for prompt in HELD_OUT for _ in range(3)]
    assert [r.group for r in e] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(u) == 12
    groups, advantages = defaultdict(set), defaultdict(list)
    for k, rollout in enumerate(u):
        groups[rollout.group].add((rollout.prompt, k < 6))
        advantages[rollout.group].append(rollout.advantage)
        assert rollout.reward == pytest.approx(reward([rollout.completion])[0])
    # one prompt to a group, and one prompt with rollouts of both ranks
    assert all(len({prompt for prompt, _ in members}) == 1 for members in groups.values())
    assert sorted(len(members) for members in groups.values()) == [1, 1, 2]
    assert {prompt for members in groups.values() for prompt, _ in members} <= set(PROMPTS)
    assert all(len(own) == 4 and abs(sum(own)) <= rounding_bound(torch.float32, 4, own) for own in advantages.values())


def written_once(out: Path) -> None:
    own = ("failed/measured/0", [4]), ("measured/0", [1, 2, 3]), ("refused/0", [2])
    steps = [stored(out, step, training) for training, made in own for step in made]
    assert sorted(out.rglob("*step_*")) == steps
    assert {step.parent for step in steps} == set(out.rglob("entropy_influence"))


def repeated(out: Path) -> None:
    plan = read_plan(stored(out, 2) / "plan.yaml", fx.lab.EntropyInfluencePlan)
    live = fx.load_run(stored(out, 2))
    again, rounded = (
        fx.lab.run(dataclasses.replace(plan, dtype=dtype), out / dtype) for dtype in ("float64", "float32")
    )
    size = sum(abs(record["influence"]) for record in live.sequences)
    for name in ("total", "momentum", "weight_decay", "sum_per_sequence", "total_stderr"):
        bound = rounding_bound(torch.float32, TINY_POLICY, size)
        assert_within(again.summary[name], live.summary[name], bound, name)
    for name in ("per_sequence", "per_token", "matrix"):
        found, exact, in_float32 = (arrays_of(results)[name] for results in (live, again, rounded))
        # The training is in float32, whose rounding this step shows: half of all influence is one rollout's.
        bound = exact_bound(in_float32, exact, TINY_POLICY, torch.float32)
        assert bound <= 1e-2 * size, name
        assert_within(found, exact, bound, name)


def arrays_of(results: Any) -> dict[str, Any]:
    evaluation = results.evaluations[0]
    return {**evaluation.arrays, "matrix": evaluation.matrix}


def gone_on(found: list[Any]) -> None:
    for answer in found:
        assert re.match(r"eval_prompts is \['4\+5=', .* on rank 0 and \['6=', .* on", answer["refused"]["disagreement"])
        assert answer["refused"]["steps"] == 2
        assert [figures["step"] for figures in answer["refused"]["history"]] == [2]
    told = [answer["refused"]["told"] for answer in found]
    assert told == [["step 1 is not attributed: the residual is 0.5"], []]


def failed_together(found: list[Any]) -> None:
    """What fails on one rank fails on both, which wait for nothing; the first tells."""
    for answer in found:
        assert [figures["step"] for figures in answer["failed"]["history"]] == [4]
    assert found[0]["failed"]["history"] == found[1]["failed"]["history"]
    assert found[0]["failed"]["told"] == [
        "step 1 is not attributed: on rank 1: RuntimeError: no kernel",
        "step 2 is not attributed: on rank 1: OutOfMemoryError: no room",
        "step 3 is not attributed: OSError: no space",
    ]
    assert not found[1]["failed"]["told"]


def stored(out: Path, step: int, training: str = "measured/0") -> Path:
    return out / training / "entropy_influence" / f"step_{step:06d}"
