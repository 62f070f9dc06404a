"""Make and compare run directories of both experiments."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

import fx_influence as fx
from fx_influence.interop.checkpoints.load import load_checkpoint
from fx_influence.lab.plan import demo_path

ENTROPY_PLAN: dict[str, Any] = {
    "update": {"prompts": "demo/train", "num_prompts": 5, "completions_per_prompt": 4},
    "evaluations": [
        {"prompts": "demo/eval", "num_prompts": 8, "completions_per_prompt": 2},
        {"prompts": "demo/eval", "num_prompts": 3, "completions_per_prompt": 3},
    ],
    "eta_multiples": [1.0, 0.05, 0.2],
    "scaled_eta_multiples": [20.0],
    "sequences_per_block": 4,
    "seed": 1,
}
"""A small plan of the main experiment on the embedded checkpoint, with two evaluations."""
FISHER_PLAN: dict[str, Any] = {
    "dtype": "float64",
    "update": {"prompts": "demo/train", "num_prompts": 5, "completions_per_prompt": 4},
    "evaluations": [
        {"prompts": "demo/eval", "num_prompts": 4, "completions_per_prompt": 3},
        {"prompts": "demo/eval", "num_prompts": 2, "completions_per_prompt": 3},
    ],
    "sequences_per_block": 3,
    "top": 4,
    "seed": 1,
}
"""A small plan of the Fisher experiment, in float64."""
GSM8K: list[dict[str, Any]] = [
    {
        "question": "Janet’s ducks lay 16 eggs. She eats 7. How many are left?",
        "answer": "Janet has 16 - 7 = <<16-7=9>>9 eggs left.\\n#### 9",
    },
    {"question": "A robe takes 2 bolts and half of it. How many?", "answer": "2 + 1 = <<2+1=3>>3.\\n#### 3"},
    {"question": "He buys a house for $80,000. For how much?", "answer": "It is $80,000.\\n#### 80,000"},
]
"""Records as GSM8K has them."""

TIMES = ("seconds", "seconds_by_phase", "peak_memory_bytes", "peak_gpu_memory_bytes")


def demo_state() -> tuple[fx.Policy, fx.Params, fx.AdamWState]:
    """Return policy, parameters and optimizer state of the embedded checkpoint."""
    checkpoint = load_checkpoint(demo_path("demo"))
    apply, params = fx.make_functional(checkpoint.model)
    assert checkpoint.optimizer_state is not None
    return apply, params, checkpoint.optimizer_state


def write_plan(folder: Path, plan: dict[str, Any], **changes: object) -> str:
    """Write ``plan`` with some fields changed as ``plan.yaml`` in ``folder``, and return its path."""
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**plan, **changes}))
    return str(path)


def read_summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def stored_bytes(directory: Path) -> dict[str, bytes]:
    """Return every file's bytes, without the figures of time and memory."""
    figures = {k: v for k, v in read_summary(directory).items() if k not in TIMES}
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    return {**files, "summary.json": json.dumps(figures).encode()}


def kill_and_resume(command: str, plan: Path, out: Path, kills: int) -> dict[str, bytes]:
    """Return the bytes in ``out`` after ``fx-influence command`` was killed and restarted at random moments.

    Where it ends before it is killed, its bytes must be those of the other ends, and it is begun again.

    Args:
        command: ``run`` or ``fisher``.
        plan: path of the plan.
        out: run directory.
        kills: number of kills.
    """
    line = [sys.executable, "-m", "fx_influence.lab.cli", command, str(plan), "--out", str(out)]
    rng = random.Random(0)
    ends: list[dict[str, bytes]] = []
    while kills:
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(3.0, 8.0))
            assert process.returncode == 0
            ends.append(stored_bytes(out))
            shutil.rmtree(out)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills -= 1
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    ends.append(stored_bytes(out))
    assert all(end == ends[-1] for end in ends)
    return ends[-1]
