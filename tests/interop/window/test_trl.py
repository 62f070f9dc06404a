"""Windows of real TRL training runs: the account of their steps, and a training run that stays as it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding
from helpers.trl_runs import HELD_OUT, MeasuredTraining, assert_trains_like, measure_training
from transformers import TrainerCallback

import fx_influence as fx
from benchmarks.trl.variants import Variant, trainer
from fx_influence.interop.ledger.file import read_ledger
from fx_influence.interop.live.measurement import PendingStep
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl.store.training import WINDOW, training_directory, window_folder
from fx_influence.interop.trl.window import check_window
from fx_influence.interop.window.files import WindowStep, bound_in_bytes
from fx_influence.interop.window.recorder import WindowRecorder, evaluation_batch
from fx_influence.trajectory.window import Window
from fx_influence.types import Batch

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]
STEPS = "entropy_influence"
BATCH: dict[str, Any] = {"per_device_train_batch_size": 12, "learning_rate": 1e-3, "max_grad_norm": 0.5}


class Recorded:
    """The windows of a training run as their files have them, with E and the size of the files."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.windows: list[tuple[Window, list[WindowStep], Batch | None, int]] = []
        attribute = WindowRecorder._attribute

        def noting(recorder: WindowRecorder, pending: PendingStep) -> dict[str, Any]:
            files, cpu = recorder._files, torch.device("cpu")
            assert files is not None
            (params, state), steps = files.state(cpu), files.steps(cpu)
            window = Window(params=params, opt_state=state, steps=[x.step for x in steps])
            self.windows.append((window, steps, evaluation_batch(pending), files.size()))
            return attribute(recorder, pending)

        patch.setattr(WindowRecorder, "_attribute", noting)


def assert_windows_are_of_steps(recorded: Recorded, measured: MeasuredTraining, out: Path, temperature: float) -> None:
    """Assert that every account in the ledger is that of ``influence_over_steps`` on the recorded steps."""
    accounts = [entry["window"] for entry in read_ledger(out / STEPS) if "window" in entry]
    assert len(accounts) == len(recorded.windows) > 0
    apply, _ = fx.make_functional(measured.trainer.model, position_ids=False)
    for (window, steps, batch_e, size), account in zip(recorded.windows, accounts, strict=True):
        assert [row[0] for row in account["steps"]] == [x.number for x in steps]
        shape = max(x.batch.input_ids.shape for x in window.steps)
        assert size <= bound_in_bytes(window.params, window.opt_state, len(steps), *shape)
        options: dict[str, Any] = {"apply": apply, "preconditioner": "frozen", "temperature": temperature}
        result = fx.influence_over_steps(window, batch_e, stderr=True, per_token=True, **options)
        scale = float(sum(x.abs().sum() for x in result.per_sequence))
        by_name = {
            "rollouts": torch.cat(result.per_sequence).sum(),
            **{name: getattr(result, name) for name in ("momentum", "total", "total_stderr")},
        }
        regions = result.sums([x.kinds["region"] for x in steps])
        known = {row[0]: row[1] for row in account["sums"]["region"]}
        pairs = [
            *((account["figures"][name], value) for name, value in by_name.items()),
            *((known.get(name, 0.0), x) for name, x in zip(regions.names, regions.influence, strict=True)),
        ]
        for value, expected in pairs:
            assert_close_to_rounding(value, expected, terms=TINY_POLICY, scale=scale, dtype=torch.float32)
        assert account["figures"]["replay_error"] < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_windows_of_a_training(lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The account is that of the recorded steps, and the training run stays as it is, to the last bit."""
    variant = Variant("dapo", lora, 2, False, {"temperature": 0.9, "entropy_coef": 0.01})
    options = {**BATCH, "per_device_train_batch_size": 6}
    recorded = Recorded(monkeypatch)
    settings: dict[str, Any] = {"every": 2, "eval_prompts": "batch", "window": 3}
    measured = measure_training(tmp_path / "a", 8, variant, settings=settings, **options)
    assert measured.warnings == []
    entries = read_ledger(tmp_path / "a" / STEPS)
    ends = {entry["step"]: entry["window"]["first"] for entry in entries if "window" in entry}
    assert ends == {4: 2, 8: 6}
    assert_trains_like(measured.trainer, lambda: trainer(variant, str(tmp_path / "b"), 8, **options))
    assert_windows_are_of_steps(recorded, measured, tmp_path / "a", 0.9)
    assert not list((tmp_path / "a" / STEPS).glob(f"{WINDOW}*"))
    training = fx.load_training(tmp_path / "a" / STEPS)
    assert training.windows.figures["total"].tolist() == [x["window"]["figures"]["total"] for x in entries[1::2]]


@pytest.mark.slow
def test_window_with_held_out_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    settings = {"window": 2, "eval_prompts": [*HELD_OUT, "1+1+1="], "completions_per_prompt": 3}
    measured = measure_training(tmp_path, 2, settings=settings, **BATCH)
    assert measured.warnings == []
    assert recorded.windows[0][2] is not None
    assert_windows_are_of_steps(recorded, measured, tmp_path, 1.0)


@pytest.mark.slow
def test_window_of_several_steps_a_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both steps are made on the same rollouts, whose prompts are left out of E in both."""
    recorded = Recorded(monkeypatch)
    settings: dict[str, Any] = {"window": 2, "eval_prompts": "batch"}
    measured = measure_training(tmp_path, 2, Variant("grpo", False, 1, True, {}), settings=settings, **BATCH)
    assert measured.warnings == []
    [(window, _, _, _)] = recorded.windows
    assert all(x.coefficient_slopes is not None for x in window.steps)
    assert all(x.batch.behaviour_logprobs is not None for x in window.steps)
    [account] = [entry["window"] for entry in read_ledger(tmp_path / STEPS) if "window" in entry]
    assert account["figures"]["replay_error"] < 1e-2
    assert account["figures"]["rollouts"] != 0


class MoveWeights(TrainerCallback):
    """Change the weights by hand after every step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for p in kwargs["model"].parameters():
                p += 1e-3 * torch.sign(p)


@pytest.mark.slow
def test_weights_that_something_else_moves_are_refused(tmp_path: Path) -> None:
    """The replay ends elsewhere; the steps alone are measured."""
    settings: dict[str, Any] = {"window": 2, "eval_prompts": "batch"}
    prepare = lambda training: training.add_callback(MoveWeights())  # noqa: E731
    measured = measure_training(tmp_path, 2, prepare=prepare, settings=settings, **BATCH)
    [text] = measured.warnings
    assert "step 2: the window of steps 1 to 2 is not attributed: the replay ends" in text
    assert ["window" in entry for entry in read_ledger(tmp_path / STEPS)] == [False, False]


def trainer_with(several: bool, processes: int = 1, **args: Any) -> Any:
    """Return what ``check_window`` reads of a trainer."""
    settings = {"beta": 0.0, "steps_per_generation": 2 if several else 1, "gradient_accumulation_steps": 1}
    kinds = {"num_iterations": 1, "importance_sampling_level": "token", "loss_type": "grpo"}
    accelerator = SimpleNamespace(num_processes=processes)
    options = SimpleNamespace(**{**settings, **kinds, **args})
    return SimpleNamespace(args=options, accelerator=accelerator, is_deepspeed_enabled=False)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (trainer_with(False, beta=0.1), "beta is 0.1 with window=4; expected 0"),
        (trainer_with(False, processes=2), "window is 4 and 2 processes train; expected one"),
        (trainer_with(True, importance_sampling_level="sequence"), "grpo with ratios by sequence, window=4"),
        (trainer_with(True, loss_type="sapo"), "sapo with ratios by token, window=4"),
    ],
    ids=["beta", "processes", "GSPO", "SAPO"],
)
def test_trainings_that_cannot_be_replayed_are_refused(training: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_window(training, 4, "frozen")
    check_window(training, None, "frozen")


@pytest.mark.parametrize("loss", ["grpo", "sapo"])
def test_one_step_a_generation_has_windows(loss: str) -> None:
    check_window(trainer_with(False, importance_sampling_level="sequence", loss_type=loss), 4, "frozen")


def test_interrupted_window_is_in_its_trainings_directory(tmp_path: Path) -> None:
    """A training run that was killed in its first window goes on in the same directory, another in the next one."""
    window_folder(tmp_path / "steps", "a").mkdir(parents=True)
    assert training_directory(tmp_path / "steps", "a") == tmp_path / "steps"
    assert training_directory(tmp_path / "steps", "b") == tmp_path / "steps_2"


def test_window_is_an_option_of_the_callback() -> None:
    with pytest.raises(ValueError, match="window is 0; expected at least 1"):
        check_window(trainer_with(False), 0, "frozen")
    assert EntropyInfluence(window=8).every == 10
