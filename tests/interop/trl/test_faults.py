"""A fault in measuring a live training run is one warning: the run continues bit for bit."""

from __future__ import annotations

import errno
import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trl_runs import (
    HELD_OUT,
    PLAIN,
    PREFIX,
    assert_training_unchanged,
    measure_training,
    warnings_of,
)
from transformers import TrainerCallback

import fx_influence as fx
from benchmarks.trl.variants import trainer
from fx_influence.interop.live import measurement
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl import measurement as trl_measurement
from fx_influence.interop.trl.capture.recorder import METHODS, Capture
from fx_influence.interop.trl.store.step import StepStore

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


class BreakOnTrainBegin(TrainerCallback):
    """Put a failing function in the place of another when training begins."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException) -> None:
        self._patch, self._owner, self._name, self._error = patch, owner, name, error

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._patch.setattr(self._owner, self._name, failing(self._error))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (measurement, "make_functional"),
        pytest.param(measurement, "adamw_state", marks=pytest.mark.slow),
        pytest.param(trl_measurement, "held_out_rollouts", marks=pytest.mark.slow),
        pytest.param(trl_measurement, "collate", marks=pytest.mark.slow),
        (measurement, "influence"),
        pytest.param(measurement, "entropy_estimate", marks=pytest.mark.slow),
        pytest.param(measurement, "measure_change", marks=pytest.mark.slow),
        pytest.param(Capture, "overflowed", marks=pytest.mark.slow),
        (Capture, "gradient_scale"),
        (StepStore, "write"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fault_is_one_warning_a_step(owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("no memory") if name == "influence" else RuntimeError("out of luck")

    def break_later(training: Any) -> None:
        # The attachment calls some of these functions too, and must not fail.
        training.add_callback(BreakOnTrainBegin(monkeypatch, owner, name, error))

    measured = measure_training(tmp_path / "a", prepare=break_later)
    assert [text[:24] for text in measured.warnings] == ["step 1 is not attributed", "step 2 is not attributed"]
    assert all(f"{type(error).__name__}: {error}" in text for text in measured.warnings)
    assert not measured.history
    assert not any(PREFIX in key for entry in measured.trainer.state.log_history for key in entry)
    assert not (tmp_path / "a" / "entropy_influence").exists()
    monkeypatch.undo()
    assert_training_unchanged(measured.trainer, tmp_path / "b")


def test_failed_step_frees_memory_and_the_next_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update_ids: list[Any] = []

    def fail_once(params: Any, batch_u: Any, *rest: Any, **options: Any) -> Any:
        update_ids.append(weakref.ref(batch_u.input_ids))
        if len(update_ids) == 1:
            raise RuntimeError("once")
        return fx.influence(params, batch_u, *rest, **options)

    monkeypatch.setattr(measurement, "influence", fail_once)
    measured = measure_training(tmp_path)
    gc.collect()
    assert update_ids[0]() is None
    assert [metrics["step"] for metrics in measured.history] == [2]
    assert measured.warnings == ["step 1 is not attributed: RuntimeError: once"]
    names = sorted(path.name for path in (tmp_path / "entropy_influence").iterdir())
    assert names == ["ledger.jsonl", "step_000002"]


def test_result_that_does_not_add_up_is_not_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "influence", failing(fx.IdentityError("the residual is 0.5")))
    measured = measure_training(tmp_path)
    assert measured.warnings[0] == "step 1 is not attributed: the residual is 0.5"
    assert measured.trainer.state.global_step == 2
    assert not measured.history


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=["interrupt", "exit"])
def test_interruption_ends_the_training(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "influence", failing(error))
    training = trainer(PLAIN, str(tmp_path), 1)
    EntropyInfluence(1, HELD_OUT).attach(training)
    with pytest.raises(type(error)):
        training.train()


def test_warning_as_error_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "influence", failing(RuntimeError("no")))
    training = trainer(PLAIN, str(tmp_path), 1)
    influence = EntropyInfluence(1, HELD_OUT).attach(training)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*attributed")
        training.train()
    assert training.state.global_step == 1
    assert not influence.history


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, "clip_grad_norm_"])
def test_trainers_own_exception_passes_unchanged(name: str, tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 2)
    error, calls = ZeroDivisionError("the trainer's"), []
    owner = training.accelerator if name == "clip_grad_norm_" else training
    original = getattr(owner, name)

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return original(*args, **kwargs)

    setattr(owner, name, fail_once)
    influence = EntropyInfluence(1, HELD_OUT, completions_per_prompt=2).attach(training)
    with pytest.raises(ZeroDivisionError) as caught:
        training.train()
    assert caught.value is error
    training.train()
    assert [metrics["step"] for metrics in influence.history] == [1, 2]


def test_full_disk_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("fx_influence.interop.trl.store.contents.sequence_records", failing(error))
    measured = measure_training(tmp_path / "a")
    assert [text[:26] for text in measured.warnings] == ["step 1 is not attributed: ", "step 2 is not attributed: "]
    assert all("No space left on device" in text for text in measured.warnings)
    assert not measured.history
    assert not (tmp_path / "a" / "entropy_influence").exists()
    assert_training_unchanged(measured.trainer, tmp_path / "b")


def test_unwritable_directory_does_not_end_the_training(tmp_path: Path) -> None:
    def occupy(training: Any) -> None:
        training.args.output_dir = str(tmp_path / "file")

    (tmp_path / "file").write_text("in the way")
    measured = measure_training(tmp_path / "a", prepare=occupy)
    assert measured.trainer.state.global_step == 2
    assert len(measured.warnings) == 2
    assert not measured.history
    assert (tmp_path / "file").read_text() == "in the way"


def mask_completions(training: Any) -> None:
    """Mask every completion, as mask_truncated_completions does in a batch where all are cut off."""
    original = training._generate_and_score_completions

    def generate(inputs: Any) -> Any:
        output = original(inputs)
        output["completion_mask"] = torch.zeros_like(output["completion_mask"])
        return output

    training._generate_and_score_completions = generate


def test_batch_without_completion_tokens_is_measured_or_warned(tmp_path: Path) -> None:
    measured = measure_training(tmp_path / "a", prepare=mask_completions)
    assert len(measured.history) + len(measured.warnings) == 2
    for metrics in measured.history:
        assert metrics["rollouts"] == metrics["positive_advantage"] == 0
    assert_training_unchanged(measured.trainer, tmp_path / "b", prepare=mask_completions)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinite_rewards_do_not_end_the_training(value: float, tmp_path: Path) -> None:
    def judge(training: Any) -> None:
        training.reward_funcs = [lambda completions, **_: [value, *[float(len(x)) for x in completions[1:]]]]

    measured = measure_training(tmp_path / "a", 1, prepare=judge)
    assert len(measured.history) + len(measured.warnings) == 1
    assert_training_unchanged(measured.trainer, tmp_path / "b", 1, judge)


def test_failing_generation_leaves_the_trainer_as_before(tmp_path: Path) -> None:
    class FailToGenerate(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            training.model.generate = failing(RuntimeError("no kernel"))

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            del training.model.generate

    training = trainer(PLAIN, str(tmp_path), 2)
    training.add_callback(FailToGenerate())
    influence = EntropyInfluence(1, HELD_OUT).attach(training)
    texts = [text for text in warnings_of(training.train) if "attributed" in text]
    assert texts == [f"step {step} is not attributed: RuntimeError: no kernel" for step in (1, 2)]
    checkpointing = [vars(module).get("gradient_checkpointing") for module in training.model.modules()]
    assert {x for x in checkpointing if x is not None} == {True}
    assert training.model.training
    assert "gather" not in vars(training.accelerator)
    assert "_get_logits_processor" not in vars(training.model)
    assert not influence.history
