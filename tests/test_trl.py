"""Real GRPO and RLOO trainings: captured steps are the trainer's own, and measuring them changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import fx_influence as fx
from benchmarks.bench_trl_steps import Errors, measure
from benchmarks.trl_variants import PROMPTS, Variant, reward, trainer, variants
from fx_influence.interop.trl import EntropyInfluence

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of trl, transformers and accelerate about themselves
]
PLAIN = Variant("dapo", False, 1, False, {})
HELD_OUT = ["4+5=", "6=", "70+1=", "1+1+1="]
OURS = "entropy_influence/"
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time")


def measured(variant: Variant, out: Path, steps: int = 3, every: int = 1, **more: Any) -> tuple[Any, EntropyInfluence]:
    training = trainer(variant, str(out), steps, **more)
    attached = EntropyInfluence(every, HELD_OUT, completions_per_prompt=3).attach(training)
    training.train()
    return training, attached


def gpt2() -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.4}
        return GPT2LMHeadModel(GPT2Config(vocab_size=14, eos_token_id=1, bos_token_id=None, pad_token_id=0, **sizes))


def weights(training: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in training.model.named_parameters()}


@pytest.mark.parametrize("variant", list(variants()), ids=lambda variant: variant.name)
def test_captured_rollouts_add_up_to_the_trainers_gradient_and_step(variant: Variant) -> None:
    errors = measure(variant)
    assert errors["tokens"] > 0
    assert errors["steps"] == 3
    assert errors["gradient"] <= 1e-5
    assert errors["step"] <= 1e-5


@pytest.mark.parametrize("lora", [False, True])
def test_measuring_changes_nothing_of_the_training(lora: bool, tmp_path: Path) -> None:
    variant = Variant("grpo", lora, 2, True, {"entropy_coef": 0.05})
    plain = trainer(variant, str(tmp_path / "plain"), 6)
    plain.train()
    training, attached = measured(variant, tmp_path / "measured", 6)
    assert [figures["step"] for figures in attached.history] == [1, 2, 3, 4, 5, 6]
    ours, theirs = weights(training), weights(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    kept = [
        {name: value for name, value in entry.items() if not name.startswith(OURS) and name not in TIMES}
        for entry in training.state.log_history
    ]
    expected = [{name: x for name, x in entry.items() if name not in TIMES} for entry in plain.state.log_history]
    assert kept == expected
    assert training.state.num_input_tokens_seen == plain.state.num_input_tokens_seen


def test_what_is_logged_adds_up_and_foretells_the_realised_change(tmp_path: Path) -> None:
    training, attached = measured(PLAIN, tmp_path, 4, learning_rate=1e-4)
    logged = [entry for entry in training.state.log_history if OURS + "total" in entry]
    assert len(logged) == len(attached.history) == 4
    for entry, figures in zip(logged, attached.history, strict=True):
        assert all(entry[OURS + name] == value for name, value in figures.items() if name != "step")
        parts = figures["momentum"] + figures["weight_decay"] + figures["rollouts"]
        assert figures["total"] == pytest.approx(parts, rel=1e-9)
        signs = figures["positive_advantage"] + figures["negative_advantage"]
        assert figures["rollouts"] == pytest.approx(signs, rel=1e-9)
        assert figures["realised"] == pytest.approx(figures["total"], rel=0.1)
        assert figures["stderr"] > 0
        assert figures["realised_stderr"] == pytest.approx(figures["stderr"], rel=0.5)
        assert abs(figures["residual"]) < 1e-4 * abs(figures["rollouts"]) + 1e-9
        assert 0 < figures["concentration"] < 1
        assert 0 < figures["entropy"] < math.log(14)
        assert 11 < figures["ess"] <= 12
    assert attached.history[0]["momentum"] == 0
    assert attached.history[1]["momentum"] != 0
    assert all(figures["weight_decay"] != 0 for figures in attached.history)


def test_a_warm_ups_first_step_moves_nothing(tmp_path: Path) -> None:
    _, attached = measured(PLAIN, tmp_path, 2, warmup_steps=2, lr_scheduler_type="constant_with_warmup")
    first, second = attached.history
    assert first["lr"] == first["total"] == first["realised"] == first["stderr"] == 0
    assert second["lr"] > 0
    assert second["total"] != 0


def test_every_counts_as_logging_steps_does(tmp_path: Path) -> None:
    training, attached = measured(PLAIN, tmp_path, 5, every=2)
    assert [figures["step"] for figures in attached.history] == [2, 4]
    assert [e["step"] for e in training.state.log_history if OURS + "total" in e] == [2, 4]
    assert sorted(path.name for path in (tmp_path / "entropy_influence").iterdir()) == ["step_000002", "step_000004"]


def test_rloo_is_measured(tmp_path: Path) -> None:
    _, attached = measured(Variant("rloo", True, 3, False, {"beta": 0.1}), tmp_path, 2, learning_rate=1e-3)
    assert [figures["step"] for figures in attached.history] == [1, 2]
    assert all(f["realised"] == pytest.approx(f["total"], rel=0.2) for f in attached.history)


def test_a_position_counted_from_the_padding_is_reproduced(tmp_path: Path) -> None:
    """GPT-2 under trl counts positions from the first column, padding included."""
    training = trainer(PLAIN, str(tmp_path), 2, gpt2(), disable_dropout=True)
    errors = Errors(training)
    training.train()
    assert max(errors.gradient) <= 1e-5
    attached = measured(PLAIN, tmp_path / "live", 2, model=gpt2(), disable_dropout=True, learning_rate=1e-4)[1]
    for figures in attached.history:
        assert figures["unattributed"] == 0
        assert figures["realised"] == pytest.approx(figures["total"], rel=0.1)


def test_a_measured_step_is_a_run_that_all_readers_read(tmp_path: Path) -> None:
    _, attached = measured(Variant("dapo", False, 2, False, {"entropy_coef": 0.05}), tmp_path, 2)
    results = fx.load_run(tmp_path / "entropy_influence" / "step_000002")
    figures, lr = attached.history[1], attached.history[1]["lr"]
    assert results.summary["total"] * lr == pytest.approx(figures["total"], rel=1e-12)
    assert results.summary["in_this_step"]["realised"] == figures["realised"]
    arrays = results.evaluations[0].arrays
    assert arrays["per_sequence"].sum() * lr == pytest.approx(figures["rollouts"], rel=1e-9)
    assert arrays["per_token"].sum(1) == pytest.approx(arrays["per_sequence"], rel=1e-9, abs=1e-12)
    assert arrays["full"].tolist() == [figures["realised"]]
    assert [record["influence"] for record in results.sequences] == arrays["per_sequence"].tolist()
    assert len(results.update_rollouts) == 12
    assert len(results.evaluations[0].rollouts) == 12
    for record, rollout in zip(results.sequences, results.update_rollouts, strict=True):
        assert rollout.prompt in PROMPTS
        assert rollout.reward == pytest.approx(reward([rollout.completion])[0])
        assert (rollout.advantage is None) is False
        assert len(record["tokens"]) == len(rollout.completion_ids) == len(rollout.coefficients)
    summed = sum(r.advantage for r in results.update_rollouts)
    assert summed == pytest.approx(0, abs=1e-4)
