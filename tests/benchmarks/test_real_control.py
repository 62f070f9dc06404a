"""The benchmark of the controller on a pretrained chat model: its policy, its shared evaluation and its summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding

from benchmarks.evidence.arithmetic import score_tokens
from benchmarks.evidence.bench_acting import TrainingRun, update, values_before
from benchmarks.evidence.bench_control import CONTROL, TARGETS
from benchmarks.evidence.training_runs import Policy, step_states
from benchmarks.harness import mean_interval
from benchmarks.real import bench_real_control
from benchmarks.real.bench_real_control import (
    IN_PAIRS,
    TINY,
    beginning,
    initial_policy,
    markdown,
    paired_cost,
    summary,
    timed_pairs,
)
from benchmarks.real.chat_policy import answers, chat_policy, score_completions
from benchmarks.real.language_model import tiny_model
from benchmarks.real.predicted_run import Settings
from benchmarks.real.tasks import by_length, tasks
from fx_influence.interop.rollouts.batch import collate


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return initial_policy(TINY, tmp_path_factory.mktemp("tiny"))


def test_completions_are_scored_as_all_tokens_are(policy: Policy) -> None:
    rollouts = policy.sample(policy.train[:3], 2, 0)
    batch = collate(rollouts, policy.tokenizer.pad_token_id)
    assert len({len(r.prompt_ids) for r in rollouts}) > 1
    with torch.no_grad():
        pairs = zip(score_completions(policy.model, batch), score_tokens(policy.model, batch), strict=True)
        for values, expected in pairs:
            assert_close_to_rounding(values[batch.completion_mask], expected[batch.completion_mask], terms=TINY_POLICY)


def test_supervised_steps_raise_answers_and_are_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prompts = tasks("train")[:4]
    settings = Settings(tiny_model(tmp_path / "model"), (1,), 1e-2, by_length, prompts, prompts, 0, 6, 0)
    file = tmp_path / "weights" / "warm.safetensors"
    untrained, trained = (chat_policy(settings, answered, None) for answered in ([], prompts))
    first, stored = (chat_policy(settings, prompts, file) for _ in range(2))
    logprobs = [answer_logprob(x, prompts) for x in (untrained, trained, first, stored)]
    assert logprobs[1] > logprobs[0]
    assert logprobs[1] == logprobs[2] == logprobs[3]


def answer_logprob(policy: Policy, prompts: Any) -> float:
    """Return the mean log-probability of the answers' tokens."""
    batch = collate(answers(policy.tokenizer, prompts), policy.tokenizer.pad_token_id)
    with torch.no_grad():
        return float(policy.score(batch)[0][batch.completion_mask].mean())


def test_beginning_is_evaluated_once(policy: Policy, tmp_path: Path) -> None:
    training = TrainingRun(TINY, "grpo", 0, 1e-3, 1, judged=2)
    first = beginning(training, policy, tmp_path)
    assert (first["step"], len(first["pass_1"]), len(first["task"])) == (0, 2, 2)
    assert beginning(training, policy._replace(held_out=[]), tmp_path) == first


def run_of(method: str, seed: int, pass_1: list[float], seconds: float) -> dict[str, Any]:
    end = {"entropy": 0.5 + seed / 4, "task": ["sum", "sum", "gcd"], "pass_1": pass_1, "pass_8": [1.0, 1.0, 0.0]}
    return {
        "policy": "tiny",
        "method": method,
        "seed": seed,
        "setting": None,
        "found": [{}, {**end, "seconds": seconds}],
    }


def test_summary_pairs_prompts_and_averages_seeds() -> None:
    runs = [
        run_of("grpo", 0, [0.0, 0.5, 1.0], 10.0),
        run_of("control", 0, [0.5, 0.5, 1.0], 15.0),
        run_of("grpo", 1, [0.0, 0.5, 0.0], 10.0),
        run_of("control", 1, [0.0, 1.0, 0.5], 13.0),
        run_of("control", 2, [0.0, 0.0, 0.0], 99.0),
    ]
    row = summary(runs)[1]
    assert (row["method"], row["seeds"]) == ("control", 2), "seed 2 has no GRPO to compare with"
    assert row["pass_1"] == mean_interval([0.25, 0.75, 0.75])
    assert row["pass_1_more"] == mean_interval([0.25, 0.25, 0.25])
    assert row["pass_1, sum"] == mean_interval([0.25, 0.75])
    assert row["pass_8, gcd"] == mean_interval([0.0])
    assert row["cost"] == mean_interval([1.5, 1.3])
    assert row["entropy"] == mean_interval([0.5, 0.75])


def test_pairs_count_whole_cycles_and_no_rows_of_methods() -> None:
    pairs = [{"step": k, "plain": 10.0, "controlled": 10.0 if k % 4 else 30.0} for k in range(1, 9)]
    assert paired_cost(pairs) == {"mean": 1.5, "half_width": 0.0}
    timed = {**run_of("grpo", 0, [0.0] * 3, 10.0), "method": IN_PAIRS, "found": pairs}
    assert [row["method"] for row in summary([run_of("grpo", 0, [0.0] * 3, 10.0), timed])] == ["grpo"]


def test_page_has_the_verdict_with_either_cost() -> None:
    """Control gains pass@8 and holds the target, at twice the seconds of plain GRPO, or 1.5 times in pairs."""
    runs = [run_of("grpo", 0, [0.5] * 3, 10.0), run_of(CONTROL, 0, [0.5] * 3, 20.0)]
    runs[0]["found"][0].update(entropy=5.0, pass_1=[0.25], pass_8=[0.5])
    runs[1]["found"][1]["entropy"] = TARGETS[TINY]
    pairs = [{"step": 1, "plain": 10.0, "controlled": 15.0}]
    page = markdown({"summary": summary(runs), "runs": [*runs, {"method": IN_PAIRS, "found": pairs}]})
    assert "control **does not pay**" in page
    assert "takes 1.50 times the processor seconds of plain GRPO, with which it **pays, by the target**" in page
    assert "entropy 5.000, pass@1 0.250, pass@8 0.500" in page


def test_timed_pairs_train_as_control_alone(tmp_path: Path) -> None:
    """The steps of plain GRPO, which come first, are taken back; only the halves of a batch are drawn once more."""
    training = TrainingRun(TINY, IN_PAIRS, 0, 1e-2, 1, prompts=4, setting=0.8)
    paired, alone = (initial_policy(TINY, tmp_path / name) for name in ("paired", "alone"))
    [pair] = timed_pairs(training, paired)
    assert pair["plain"] > 0
    [step_state] = step_states(alone, training.lr, training.seed, 1, training.prompts, bench_real_control.COMPLETIONS)
    step_state.rng.sample(range(len(step_state.rollouts)), len(step_state.rollouts))
    weights = torch.ones(step_state.batch.input_ids.shape)
    update(training, alone, step_state, values_before(alone, step_state), weights, lambda _: 0.0)
    for trained, expected in zip(paired.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(trained, expected)


def test_first_runs_are_a_seed_of_every_method() -> None:
    runs = [run for run in bench_real_control.training_runs(quick=False) if run.method != IN_PAIRS]
    assert {(run.method, run.seed) for run in runs[:9]} == {(method, 0) for method in bench_real_control.SETTINGS}
    assert [run.method for run in runs[:2]] == ["grpo", "control"]
    assert len({run.name for run in runs}) == len(runs)
