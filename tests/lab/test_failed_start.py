"""A start that fails leaves nothing that would prevent a corrected plan from using the directory."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import fx_influence as fx
from fx_influence.interop.runtime.run_files import FAILED
from fx_influence.lab.cli import main
from fx_influence.lab.experiment import runner as experiment

PLAN: dict[str, Any] = {
    "update": {"prompts": "demo/train", "num_prompts": 2, "completions_per_prompt": 4},
    "evaluations": [{"prompts": "demo/eval", "num_prompts": 2, "completions_per_prompt": 2}],
    "directions": [],
    "scaled_eta_multiples": [],
    "reward": "made_rewards:reward",
}


@pytest.fixture
def rewards(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Make a module of rewards, whose ``reward`` gives every completion the same."""
    module = ModuleType("made_rewards")

    def same(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    def by_length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    def missing(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        raise RuntimeError("no connection")

    for function in (same, by_length, missing):
        setattr(module, function.__name__, function)
    module.reward = same  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_rewards", module)
    return module


def run(folder: Path, **changes: Any) -> int:
    (folder / "plan.yaml").write_text(yaml.safe_dump({**PLAN, **changes}))
    return main(["run", str(folder / "plan.yaml"), "--out", str(folder / "out")])


@pytest.mark.slow
@pytest.mark.usefixtures("rewards")
@pytest.mark.parametrize("broken", ["same", "missing"])
def test_run_reuses_directory_when_plan_is_corrected(tmp_path: Path, broken: str) -> None:
    assert run(tmp_path, reward=f"made_rewards:{broken}") == 1
    assert (tmp_path / "out" / FAILED).is_file()
    assert run(tmp_path, reward="made_rewards:by_length") == 0
    assert not (tmp_path / "out" / FAILED).exists()
    assert fx.load_run(tmp_path / "out").plan.reward == "made_rewards:by_length"


@pytest.mark.slow
def test_run_judges_again_when_reward_is_corrected(tmp_path: Path, rewards: ModuleType) -> None:
    assert run(tmp_path) == 1
    rewards.reward = rewards.by_length  # type: ignore[attr-defined]
    assert run(tmp_path) == 0
    assert all(record["reward"] for record in fx.load_run(tmp_path / "out").sequences)


@pytest.mark.usefixtures("rewards")
def test_run_leaves_directory_alone_when_user_added_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 1
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert run(tmp_path, reward="made_rewards:by_length") == 1
    assert "holds a run of another plan" in capsys.readouterr().err
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_run_rejects_unwritable_place_before_loading_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiment, "load_state", lambda *_: pytest.fail("the model was read"))
    (tmp_path / "file").write_text("")
    assert main(["run", "--out", str(tmp_path / "file" / "out")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "file'. Choose another --out" in line
