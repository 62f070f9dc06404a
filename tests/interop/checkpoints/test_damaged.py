"""Files of a checkpoint that cannot be read: one line that names the file's place, on the command line too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from fx_influence.interop.checkpoints.load import load_checkpoint
from fx_influence.lab.cli import main
from fx_influence.lab.plan import demo_path

HALF = -1
"""Stands for the first half of the file."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_path("demo"), tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "model.safetensors",
            HALF,
            r"the weights in .*checkpoint cannot be read: .*model\.safetensors is damaged: cut off",
        ),
        (
            "model.safetensors",
            b"",
            r"the weights in .*checkpoint cannot be read: .*model\.safetensors is damaged: empty",
        ),
        ("model.safetensors", b"garbage" * 9, r"the weights in .*model\.safetensors is damaged: .*no safetensors"),
        ("tokenizer.json", HALF, r"the tokenizer or config\.json in .*checkpoint is damaged"),
        ("tokenizer.json", b"{}", r"the tokenizer or config\.json in .*checkpoint cannot be read"),
        ("tokenizer_config.json", b"", r"the tokenizer or config\.json in .*tokenizer_config\.json is damaged: empty"),
        ("config.json", b"[]", r"the tokenizer or config\.json in .*checkpoint cannot be read"),
        ("config.json", HALF, r"checkpoint/config\.json' is not a valid JSON file"),
        ("generation_config.json", HALF, r"checkpoint/generation_config\.json' is not a valid JSON file"),
        (
            "generation_config.json",
            b"<html>",
            r"the weights in .*checkpoint cannot be read: .*generation_config\.json is damaged: an HTML",
        ),
        ("optimizer.pt", HALF, r"optimizer\.pt is damaged"),
    ],
)
def test_load_names_damaged_file(checkpoint: Path, name: str, data: bytes | int, message: str) -> None:
    file = checkpoint / name
    stored = file.read_bytes()
    file.write_bytes(stored[: len(stored) // 2] if isinstance(data, int) else data)
    with pytest.raises((ValueError, OSError), match=message):
        load_checkpoint(checkpoint)


def test_cli_names_damaged_checkpoint_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"")
    plan: dict[str, Any] = {
        "checkpoint": "checkpoint",
        "reward": "fx_influence.interop.rewards:exact_match",
        "loss": "grpo",
    }
    plan |= {"max_new_tokens": 4, "update": {"prompts": "demo/train"}, "evaluations": [{"prompts": "demo/eval"}]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert main(["run", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fx-influence: ")]
    assert "the weights in" in line
    assert not (tmp_path / "out").exists()


def test_cli_tells_directory_from_missing_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for prompts, said in ((str(tmp_path), "is a directory"), ("What is 1+1?", "does not exist")):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"update": {"prompts": prompts}}))
        assert main(["run", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]) == 1
        assert (
            f"{said}; expected a file of prompts. Check the path, or give the prompts themselves in a list"
            in capsys.readouterr().err
        )
