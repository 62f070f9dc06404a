"""Training runs measured on their own rollouts, each without its own prompt: nothing is generated for E."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.present import present
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding
from helpers.trl_runs import PLAIN, assert_training_unchanged, measure_training

import fx_influence as fx
from benchmarks.trl.variants import Variant, trainer
from fx_influence.interop.trl import EntropyInfluence, measurement

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]
FIVE_PROMPTS: dict[str, Any] = {"per_device_train_batch_size": 15}


def test_batch_is_the_default_and_generates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "held_out_rollouts", lambda *args: pytest.fail("E was generated"))
    training = trainer(PLAIN, str(tmp_path), 2, **FIVE_PROMPTS)
    influence = EntropyInfluence(1).attach(training)
    training.train()
    for metrics in influence.history:
        parts = [metrics[name] for name in ("momentum", "weight_decay", "rollouts", "unattributed")]
        scale = sum(map(abs, parts))
        assert_close_to_rounding(metrics["total"], sum(parts), terms=TINY_POLICY, scale=scale, dtype=torch.float32)
        assert metrics["self_influence"] != 0
    run = fx.load_run(tmp_path / "entropy_influence" / "step_000001")
    assert [r.completion_ids for r in run.evaluations[0].rollouts] == [r.completion_ids for r in run.update_rollouts]


def test_measured_change_leaves_out_what_the_prediction_does(tmp_path: Path) -> None:
    """At a small step, whose denominator does not respond to the gradient, both are one estimate with one error."""
    history = measure_training(
        tmp_path,
        3,
        settings={"eval_prompts": "batch"},
        learning_rate=1e-2,
        adam_epsilon=1e2,
        max_grad_norm=0.0,
        **FIVE_PROMPTS,
    ).history
    assert len(history) == 3
    for metrics in history:
        assert metrics["measured"] == pytest.approx(metrics["total"], rel=0.05)
        assert metrics["measured_stderr"] == pytest.approx(metrics["stderr"], rel=0.5)
        assert metrics["unexplained_stderr"] < metrics["stderr"]
    assert any(abs(metrics["self_influence"]) > 0.1 * abs(metrics["total"]) for metrics in history)


@pytest.mark.slow
def test_measuring_on_the_batch_leaves_the_training_unchanged(tmp_path: Path) -> None:
    measured = measure_training(tmp_path / "measured", settings={"eval_prompts": "batch"}, **FIVE_PROMPTS)
    assert not measured.warnings
    assert_training_unchanged(measured.trainer, tmp_path / "plain", **FIVE_PROMPTS)


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"per_device_train_batch_size": 9}, {}, "has 9 rollouts of 3 prompts.*at least 4 prompts"),
        ({"num_iterations": 2}, {"matrix": True}, "matrix is True .*Leave the matrix out"),
        ({"mask_truncated_completions": True}, {}, "mask_truncated_completions is True"),
        ({}, {"save_state": True}, "save_state is True with eval_prompts='batch'"),
    ],
    ids=["few prompts", "matrix", "masked", "state"],
)
def test_attach_refuses_batches_that_are_no_evaluation(
    options: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    training = trainer(Variant("grpo", False, 1, False, {}), str(tmp_path), 1, **{**FIVE_PROMPTS, **options})
    with pytest.raises(ValueError, match=message):
        EntropyInfluence(1, **settings).attach(training)


def test_attach_refuses_older_rollouts_without_logprobs(tmp_path: Path) -> None:
    training = trainer(Variant("rloo", False, 1, False, {}), str(tmp_path), 1, **{**FIVE_PROMPTS, "num_iterations": 2})
    with pytest.raises(ValueError, match=r"several optimizer steps a generation .*Pass held-out prompts"):
        EntropyInfluence(1).attach(training)


def with_more_prompts(training: Any) -> None:
    training.train_dataset = Dataset.from_list([{"prompt": f"{k}+{k + 1}="} for k in range(12)])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"num_iterations": 2}, {"steps_per_generation": 2}], ids=["again", "in parts"])
def test_rollouts_of_an_older_policy_are_weighted(options: dict[str, Any], tmp_path: Path) -> None:
    """The second step is on rollouts of the policy before the first, which are weighted."""
    run = measure_training(
        tmp_path,
        2,
        prepare=with_more_prompts,
        settings={"eval_prompts": "batch"},
        learning_rate=3e-4,
        per_device_train_batch_size=12,
        **options,
    )
    assert not run.warnings
    assert len(run.history) == 2
    for metrics in run.history:
        assert abs(metrics["measured"] - metrics["total"]) < 2 * metrics["unexplained_stderr"]
        assert 6 < metrics["ess"] < 12
    stored = [fx.load_run(tmp_path / "entropy_influence" / f"step_00000{k}") for k in (1, 2)]
    sampled = [fx.collate(x.evaluations[0].rollouts, 0, off_policy=True).behaviour_logprobs for x in stored]
    scored = [torch.as_tensor(x.tokens["logprobs"]) for x in stored]
    gaps = [float((present(b) - s).abs().max()) for b, s in zip(sampled, scored, strict=True)]
    assert gaps[0] < 1e-4 < 1e-3 < gaps[1]
