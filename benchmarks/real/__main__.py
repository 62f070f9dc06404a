"""Prepare a real policy for ``fx-influence run``: SmolLM2-135M-Instruct after some steps of GRPO (``make real``).

    python -m benchmarks.real [FOLDER]

Writes the model into FOLDER/model, a LoRA training state of a few steps into FOLDER/policy, and the plan smollm2.yaml
beside them; what is there already is not made again.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT
from benchmarks.real.language_model import FOLDER, prepare_model
from benchmarks.real.training_run import TOKENS, trainer
from benchmarks.trl.variants import quiet
from fx_influence.interop.rewards import math_verify

PLAN = ROOT / "docs" / "smollm2.yaml"
STEPS = 8


def prepare_policy(folder: Path, model: Path, weights: str = "lora") -> Path:
    """Return the directory of a training state, after a training run of ``STEPS`` steps at the first call.

    Args:
        folder: in which it is made.
        model: directory of the model.
        weights: "lora" or "full".
    """
    target = folder / {"lora": "policy", "full": "policy_full"}[weights]
    if not target.is_dir():
        train(folder, model, {STEPS: target}, weights)
    return target


def prepare_policies(folder: Path, model: Path, steps: Sequence[int]) -> list[Path]:
    """Return the directories of the LoRA training states after each of ``steps`` steps of one training run.

    Args:
        folder: in which they are made at the first call.
        model: directory of the model.
        steps: numbers of optimizer steps.
    """
    targets = {count: folder / f"policy_after_{count}" for count in steps}
    missing = {count: target for count, target in targets.items() if not target.is_dir()}
    if missing:
        train(folder, model, missing)
    return list(targets.values())


def train(folder: Path, model: Path, targets: Mapping[int, Path], weights: str = "lora") -> None:
    """Make a training run of "lora" or "full" and move its states into ``targets``, by their numbers of steps."""
    save: dict[str, Any] = {"save_strategy": "steps", "save_steps": math.gcd(*targets), "warmup_steps": 2}
    with tempfile.TemporaryDirectory(dir=folder) as out, quiet():
        trainer(model, out, weights, max(targets), math_verify, TOKENS, **save).train()
        for count, target in targets.items():
            (Path(out) / f"checkpoint-{count}").rename(target)


def main(argv: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder = command.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    prepare_policy(folder, prepare_model(folder))
    shutil.copy(PLAN, folder / PLAN.name)
    print(f"fx-influence run {folder / PLAN.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
