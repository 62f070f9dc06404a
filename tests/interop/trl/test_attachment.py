"""Attach and detach EntropyInfluence: alone, in callbacks=[...], several at once, under names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from helpers.trl_runs import (
    HELD_OUT,
    PLAIN,
    PREFIX,
    assert_detached,
    measure_training,
    warnings_of,
    without_seconds,
)
from trl import GRPOTrainer

import fx_influence as fx
from benchmarks.trl.variants import PROMPTS, reward, tokenizer, trainer
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl.capture.recorder import METHODS

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]


def measured_separately(out: Path, **settings: Any) -> list[dict[str, float]]:
    return without_seconds(measure_training(out, settings=settings).history)


def trainer_with_callbacks(out: Path, *callbacks: Any, **more: Any) -> Any:
    """Return a trainer made with callbacks, otherwise as ``trainer`` makes it."""
    plain = trainer(PLAIN, str(out), 2)
    return GRPOTrainer(
        plain.model,
        args=plain.args,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        **more,
    )


@pytest.mark.slow
def test_callback_instance_attaches_itself(tmp_path: Path) -> None:
    influence = EntropyInfluence(1, HELD_OUT, completions_per_prompt=2)
    training = trainer_with_callbacks(tmp_path / "a", influence)
    training.train()
    assert without_seconds(influence.history) == measured_separately(tmp_path / "b")
    assert [PREFIX + "total" in entry for entry in training.state.log_history] == [True, True, False]
    influence.detach()
    assert_detached(training)


@pytest.mark.slow
def test_callback_class_attaches_itself(tmp_path: Path) -> None:
    class EveryStep(EntropyInfluence):
        def __init__(self) -> None:
            super().__init__(1, None, completions_per_prompt=2)

    held_out = Dataset.from_list([{"prompt": prompt} for prompt in HELD_OUT])
    training = trainer_with_callbacks(tmp_path / "a", EveryStep, eval_dataset=held_out)
    training.train()
    [influence] = [x for x in training.callback_handler.callbacks if isinstance(x, EveryStep)]
    assert without_seconds(influence.history) == measured_separately(tmp_path / "b")


def test_callback_warns_when_it_cannot_attach(tmp_path: Path) -> None:
    influence = EntropyInfluence(1, None)
    training = trainer_with_callbacks(tmp_path, influence)
    texts = warnings_of(training.train)
    assert any("no step of this training run is measured: eval_prompts is None" in text for text in texts)
    assert training.state.global_step == 2
    assert not influence.history


def test_attach_is_refused_twice_and_moves_between_trainers(tmp_path: Path) -> None:
    influence = EntropyInfluence(1, HELD_OUT, completions_per_prompt=2)
    first, second = (trainer_with_callbacks(tmp_path / place, influence) for place in ("a", "b"))
    influence.attach(first)
    with pytest.raises(ValueError, match="attached to this GRPOTrainer already"):
        influence.attach(first)
    second.train()
    assert len(influence.history) == 2
    assert_detached(first)


@pytest.mark.slow
def test_two_attached_measure_as_each_separately(tmp_path: Path) -> None:
    settings: tuple[dict[str, Any], ...] = ({"every": 1}, {"every": 2, "preconditioner": "jacobian", "seed": 3})
    training = trainer(PLAIN, str(tmp_path / "both"), 2)
    both = [EntropyInfluence(eval_prompts=HELD_OUT, completions_per_prompt=2, **x) for x in settings]
    for influence in both:
        influence.attach(training)
    training.train()
    for k, influence in enumerate(both):
        assert without_seconds(influence.history) == measured_separately(tmp_path / str(k), **settings[k])
    last = training.state.log_history[1]
    assert last[PREFIX + "total"] == both[0].history[1]["total"]
    assert last[PREFIX + "2/total"] == both[1].history[0]["total"]
    places = ("entropy_influence/step_000002", "entropy_influence-2/step_000002")
    totals = [fx.load_run(tmp_path / "both" / place).summary["in_this_step"]["total"] for place in places]
    assert totals == [both[0].history[1]["total"], both[1].history[0]["total"]]
    both[0].detach()
    assert set(METHODS) <= set(vars(training))
    both[1].detach()
    assert_detached(training)


def test_name_prefixes_metrics_and_is_taken_once(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    EntropyInfluence(1, HELD_OUT, completions_per_prompt=1, name="arith").attach(training)
    with pytest.raises(ValueError, match="name is 'arith', as of another"):
        EntropyInfluence(1, HELD_OUT, name="arith").attach(training)
    with pytest.raises(ValueError, match="name is 'a/b'; expected letters"):
        EntropyInfluence(1, HELD_OUT, name="a/b")
    with pytest.raises(ValueError, match=r"objective\.score is 0\.5; expected 1"):
        EntropyInfluence(1, HELD_OUT, objective=fx.Entropy(score=0.5))
    training.train()
    assert PREFIX + "arith/total" in training.state.log_history[0]
    assert (tmp_path / "entropy_influence-arith" / "step_000001").is_dir()


def test_detach_restores_a_method_set_by_the_user(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    original = training.compute_loss
    training.compute_loss = lambda *args, **kwargs: original(*args, **kwargs)
    users_method = training.compute_loss
    first, second = (EntropyInfluence(1, HELD_OUT).attach(training) for _ in range(2))
    first.detach()
    second.detach()
    assert training.compute_loss is users_method
    first.detach()


def test_detach_leaves_the_trainer_as_before(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    influence = EntropyInfluence(1, HELD_OUT).attach(training)
    influence.detach()
    assert_detached(training)
    training.train()
    assert not influence.history
    assert not (tmp_path / "entropy_influence").exists()
