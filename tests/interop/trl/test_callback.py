"""Real GRPO and RLOO training runs: measuring does not change them, and the logged terms add up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding, rounding_bound
from helpers.trl_runs import (
    HELD_OUT,
    PLAIN,
    PREFIX,
    MeasuredTraining,
    assert_logged,
    measure_training,
    trainers_own_log,
    weights_of,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fx_influence as fx
from benchmarks.trl.variants import PROMPTS, Variant, trainer
from fx_influence.interop.live.metrics import LogSelection
from fx_influence.interop.trl import EntropyInfluence

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]
PARTS = ("momentum", "weight_decay", "rollouts", "unattributed")


def measured_on_twelve(
    out: Path, steps: int, variant: Variant = PLAIN, every: int = 1, **options: Any
) -> MeasuredTraining:
    """Measure a training run on 12 rollouts of 4 prompts."""
    settings = {"every": every, "eval_prompts": [*HELD_OUT, "1+1+1="], "completions_per_prompt": 3}
    return measure_training(out, steps, variant, settings=settings, **options)


def assert_parts_add_up(metrics: dict[str, float]) -> None:
    scale = sum(abs(metrics[name]) for name in PARTS)
    parts = sum(metrics[name] for name in PARTS)
    assert_close_to_rounding(metrics["total"], parts, terms=TINY_POLICY, scale=scale, dtype=torch.float32)


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "LoRA"])
def test_measuring_leaves_the_training_unchanged(lora: bool, tmp_path: Path) -> None:
    variant = Variant("grpo", lora, 2, True, {"entropy_coef": 0.05})
    plain = trainer(variant, str(tmp_path / "plain"), 6)
    plain.train()
    measured = measured_on_twelve(tmp_path / "measured", 6, variant)
    assert [metrics["step"] for metrics in measured.history] == [1, 2, 3, 4, 5, 6]
    weights, expected = weights_of(measured.trainer), weights_of(plain)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert trainers_own_log(measured.trainer) == trainers_own_log(plain)
    assert measured.trainer.state.num_input_tokens_seen == plain.state.num_input_tokens_seen


def test_logged_metrics_add_up_and_predict_the_change(tmp_path: Path) -> None:
    measured = measured_on_twelve(tmp_path, 4, learning_rate=1e-4)
    logged = [entry for entry in measured.trainer.state.log_history if PREFIX + "total" in entry]
    assert len(logged) == len(measured.history) == 4
    for entry, metrics in zip(logged, measured.history, strict=True):
        assert_logged(entry, metrics)
        assert_parts_add_up(metrics)
        by_sign = metrics["positive_advantage"], metrics["negative_advantage"]
        scale = sum(map(abs, by_sign))
        assert_close_to_rounding(metrics["rollouts"], sum(by_sign), terms=12, scale=scale, dtype=torch.float32)
        assert metrics["measured"] == pytest.approx(metrics["total"], rel=0.1)
        assert metrics["stderr"] > 0
        assert metrics["measured_stderr"] == pytest.approx(metrics["stderr"], rel=0.5)
        assert_close_to_rounding(metrics["residual"], 0.0, terms=TINY_POLICY, scale=scale, dtype=torch.float32)
        assert 0 < metrics["concentration"] < 1
        assert 0 < metrics["entropy"] < math.log(14)
        assert 11 < metrics["ess"] <= 12
    assert measured.history[0]["momentum"] == 0
    assert measured.history[1]["momentum"] != 0
    assert all(metrics["weight_decay"] != 0 for metrics in measured.history)


def test_step_with_lr_zero_changes_nothing(tmp_path: Path) -> None:
    """A warm-up's first step has a learning rate of 0."""
    warm_up: dict[str, Any] = {"warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup"}
    first, second = measured_on_twelve(tmp_path, 2, **warm_up).history
    assert first["lr"] == first["total"] == first["measured"] == first["stderr"] == 0
    assert second["lr"] > 0
    assert second["total"] != 0


@pytest.mark.slow
def test_every_counts_as_logging_steps_does(tmp_path: Path) -> None:
    measured = measured_on_twelve(tmp_path, 5, every=2)
    assert [metrics["step"] for metrics in measured.history] == [2, 4]
    assert [e["step"] for e in measured.trainer.state.log_history if PREFIX + "total" in e] == [2, 4]
    names = sorted(path.name for path in (tmp_path / "entropy_influence").iterdir())
    assert names == ["ledger.jsonl", "step_000002", "step_000004"]


def test_rloo_trainer_is_measured(tmp_path: Path) -> None:
    variant = Variant("rloo", True, 3, False, {"beta": 0.1})
    history = measured_on_twelve(tmp_path, 2, variant, learning_rate=1e-3).history
    assert [metrics["step"] for metrics in history] == [1, 2]
    assert all(metrics["measured"] == pytest.approx(metrics["total"], rel=0.2) for metrics in history)


def test_eval_dataset_of_conversations_gives_the_prompts(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    training.processing_class.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    training.train_dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": p[:-1]}]} for p in PROMPTS])
    training.eval_dataset = training.train_dataset
    influence = EntropyInfluence(1, None, completions_per_prompt=2).attach(training)
    training.reward_funcs = [lambda completions, **_: [float(len(c[0]["content"])) for c in completions]]
    training.train()
    rollouts = fx.load_run(tmp_path / "entropy_influence" / "step_000001").evaluations[0].rollouts
    assert [r.prompt for r in rollouts] == [p for p in PROMPTS for _ in range(2)]
    assert [r.group for r in rollouts] == [i for i in range(6) for _ in range(2)]
    assert influence.history[0]["total"] != 0


def test_tensorboard_has_the_metrics(tmp_path: Path) -> None:
    history = measured_on_twelve(tmp_path / "run", 2, report_to=["tensorboard"]).history
    [file] = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent)).Reload()
    for name, value in LogSelection().of_step(history[-1]).items():
        logged = events.Scalars(f"train/{PREFIX}{name}")[-1].value
        assert logged == pytest.approx(value, rel=rounding_bound(torch.float32))


def test_bfloat16_autocast_leaves_part_unattributed(tmp_path: Path) -> None:
    """Under bfloat16 autocast the trainer's gradient is rounded; the part rollouts do not explain is reported."""
    measured = measured_on_twelve(tmp_path, 1, bf16=True, learning_rate=1e-4)
    metrics = measured.history[0]
    assert metrics["unattributed"] != 0
    assert_parts_add_up(metrics)
    sequences = fx.load_run(tmp_path / "entropy_influence" / "step_000001").sequences
    assert abs(metrics["unattributed"]) < 0.1 * metrics["lr"] * sum(abs(r["influence"]) for r in sequences)
    assert next(measured.trainer.model.parameters()).dtype == torch.float32
