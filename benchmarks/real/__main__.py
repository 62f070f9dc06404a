"""Prepare a real policy for ``fx-influence run``: SmolLM2-135M-Instruct after some steps of GRPO (``make real``).

    python -m benchmarks.real [FOLDER]

Writes the model into FOLDER/model, a LoRA training state of a few steps into FOLDER/policy, and the plan smollm2.yaml
beside them; what is there already is not made again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import ROOT
from benchmarks.real.language_model import FOLDER, prepare_model
from benchmarks.real.training_run import TOKENS, trainer
from benchmarks.trl.variants import quiet
from fx_influence.interop.rewards import math_verify

PLAN = ROOT / "docs" / "smollm2.yaml"
STEPS = 8


def prepare_policy(folder: Path, model: Path, steps: int = STEPS, name: str = "policy") -> Path:
    """Return the directory of a LoRA training state, after a training run of ``steps`` steps at the first call.

    Args:
        folder: in which it lies.
        model: directory of the model.
        steps: number of optimizer steps.
        name: of the directory.
    """
    target = folder / name
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=folder) as out, quiet():
            training = trainer(
                model, out, "lora", steps, math_verify, TOKENS, save_strategy="steps", save_steps=steps, warmup_steps=2
            )
            training.train()
            (Path(out) / f"checkpoint-{steps}").rename(target)
    return target


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
