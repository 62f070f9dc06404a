"""Each training run has its own directory of steps, over resumptions too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.trl_runs import HELD_OUT, PLAIN, measure_training, warnings_of
from transformers import TrainerCallback

from benchmarks.trl.variants import trainer
from fx_influence.interop.trl import EntropyInfluence

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]


def training_ids(out: Path) -> dict[str, str]:
    """Return the id of the training run of each stored step."""
    files = sorted(out.glob("entropy_influence*/step_*/environment.json"))
    return {str(file.parent.relative_to(out)): json.loads(file.read_text())["training"] for file in files}


def train_once(out: Path, steps: int, resume: str | None = None, **options: Any) -> None:
    training = trainer(PLAIN, str(out), steps, **options)
    EntropyInfluence(1, HELD_OUT, completions_per_prompt=1).attach(training)
    training.train(resume_from_checkpoint=resume)


@pytest.mark.slow
def test_second_training_stores_in_another_directory(tmp_path: Path) -> None:
    train_once(tmp_path, 1)
    before = training_ids(tmp_path)
    texts = warnings_of(lambda: train_once(tmp_path, 1))
    after = training_ids(tmp_path)
    assert list(after) == ["entropy_influence/step_000001", "entropy_influence_2/step_000001"]
    assert after[next(iter(before))] == next(iter(before.values()))
    assert len(set(after.values())) == 2
    assert any("holds steps of another training run" in text for text in texts)


@pytest.mark.slow
def test_resumed_training_continues_in_its_directory(tmp_path: Path) -> None:
    """Another training run in between has its own directory, which is not written to."""
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_only_model": False}
    train_once(tmp_path, 2, **saving)
    first = training_ids(tmp_path)
    (tmp_path / "entropy_influence" / "step_000002" / "note.txt").write_text("of the first time")
    train_once(tmp_path, 1)
    train_once(tmp_path, 3, str(tmp_path / "checkpoint-1"), **saving)
    after = training_ids(tmp_path)
    assert {name: after[name] for name in first} == first
    assert after["entropy_influence/step_000003"] == first["entropy_influence/step_000001"]
    assert not (tmp_path / "entropy_influence" / "step_000002" / "note.txt").exists()
    assert [name for name in after if name not in first] == [
        "entropy_influence/step_000003",
        "entropy_influence_2/step_000001",
    ]


def test_training_goes_on_when_its_directory_is_removed(tmp_path: Path) -> None:
    class Remove(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            shutil.rmtree(tmp_path / "entropy_influence")

    measured = measure_training(tmp_path, prepare=lambda training: training.add_callback(Remove()))
    assert not measured.warnings
    assert [metrics["step"] for metrics in measured.history] == [1, 2]
