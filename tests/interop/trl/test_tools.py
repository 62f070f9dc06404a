"""Training runs whose completions hold what the policy did not sample: results of tools, environments, turns."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding, rounding_bound
from helpers.trl_runs import HELD_OUT, MeasuredTraining, assert_trains_like, warnings_about_steps
from helpers.trl_tools import Counter, tool_trainer, two_turns

import fx_influence as fx
from benchmarks.trl.bench_trl_steps import Errors
from fx_influence.interop.trl import EntropyInfluence

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]

SOURCES: dict[str, dict[str, Any]] = {
    "tools": {},
    "environment": {"sources": {"environment_factory": Counter}},
    "rollout_func": {"sources": {"rollout_func": two_turns}},
}


def measured_run(out: Path, steps: int, **options: Any) -> MeasuredTraining:
    """Train with every step measured on its own rollouts."""
    training = tool_trainer(str(out), steps, **options)
    influence = EntropyInfluence(1).attach(training)
    return MeasuredTraining(training, influence, warnings_about_steps(training.train))


def test_results_of_tools_are_not_the_policys_tokens(tmp_path: Path) -> None:
    """Results of tools stand in the middle of completions and take no part in sums; what the policy says after does."""
    measured = measured_run(tmp_path, 1)
    assert not measured.warnings
    [metrics] = measured.history
    parts = [metrics[name] for name in ("momentum", "weight_decay", "rollouts", "unattributed")]
    scale = sum(map(abs, parts))
    assert_close_to_rounding(metrics["total"], sum(parts), terms=TINY_POLICY, scale=scale, dtype=torch.float32)
    assert metrics["unattributed"] == 0
    run = fx.load_run(tmp_path / "entropy_influence" / "step_000001")
    masks = [r.completion_mask for r in run.update_rollouts if r.completion_mask is not None]
    assert masks
    assert all(mask[0] and mask[-1] for mask in masks)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_captured_rollouts_with_gaps_add_up(source: str, tmp_path: Path) -> None:
    training = tool_trainer(str(tmp_path), 2, **SOURCES[source], learning_rate=0.02)
    errors = Errors(training)
    training.train()
    assert max(errors.gradient) <= rounding_bound(torch.float32, TINY_POLICY)
    assert max(errors.step) <= rounding_bound(torch.float32, 1, 1e3)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_rollouts_with_gaps_are_measured(source: str, tmp_path: Path) -> None:
    """Prediction and measurement agree within their error, no bit of the training changes, no prompt loses its rows."""
    options = {**SOURCES[source], "learning_rate": 1e-3, "adam_epsilon": 1e2, "max_grad_norm": 0.0}
    Counter.resets = 0
    measured = measured_run(tmp_path / "measured", 3, **options)
    assert not measured.warnings
    assert len(measured.history) == 3
    for metrics in measured.history:
        assert metrics["unattributed"] == 0
        assert abs(metrics["measured"] - metrics["total"]) <= 4 * metrics["unexplained_stderr"]
    Counter.resets = 0
    assert_trains_like(measured.trainer, lambda: tool_trainer(str(tmp_path / "plain"), 3, **options))
    run = fx.load_run(tmp_path / "measured" / "entropy_influence" / "step_000003")
    assert sorted(r.group for r in run.update_rollouts) == sorted([0, 1, 2, 3, 4] * 3)
    assert any(r.completion_mask is not None and not all(r.completion_mask) for r in run.update_rollouts)


@pytest.mark.slow
def test_a_rollout_func_that_samples_otherwise_is_refused(tmp_path: Path) -> None:
    sources = {"rollout_func": functools.partial(two_turns, temperature=8.0)}
    measured = measured_run(tmp_path, 2, sources=sources)
    assert not measured.history
    [text] = measured.warnings
    assert "were not sampled from the policy: the log-probabilities they were sampled with" in text


@pytest.mark.parametrize("source", SOURCES)
def test_attach_refuses_held_out_prompts_with(source: str, tmp_path: Path) -> None:
    training = tool_trainer(str(tmp_path), 1, **SOURCES[source])
    with pytest.raises(ValueError, match=r"E is 3 held-out prompts and trainer.* is set.*Pass eval_prompts='batch'"):
        EntropyInfluence(1, HELD_OUT).attach(training)
