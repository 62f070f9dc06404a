"""A GRPO training run on the tasks of two sources, attributed or not, which continues where it was stopped.

    python -m benchmarks.real.two_sources.training --out FOLDER --model FOLDER [--sources ...] [--attributed] ...

Prompts, seeds and steps are the same whatever the sources: rewards of a source that is not among ``--sources`` are 0,
so that its rollouts are sampled and have no advantages.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.harness import one_thread, write_json
from benchmarks.real.tasks import by_length, messages
from benchmarks.real.training_run import trainer
from benchmarks.real.two_sources.tasks import SOURCES, of_sources, solved, tasks
from benchmarks.trl.variants import quiet
from fx_influence.interop.trl import EntropyInfluence

PROMPTS, COMPLETIONS = 6, 2
"""Prompts of a step, half of them of each source, and completions of each."""
EVERY, FRESH = 4, 12
"""Steps from one second E to the next, and its prompts, one completion of each."""
SAVED = 4
"""Steps from one checkpoint to the next."""
SECOND = "second"
"""Name of the callback whose E are fresh rollouts of other prompts."""
SEED = 0
LEARNING_RATE = 5e-4
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers that get adapters."""


class Clock(TrainerCallback):
    """Callback that prints each step with the wall-clock and processor seconds since the training run began."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = (time.perf_counter(), time.process_time())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wall, processor = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        print(f"step {state.global_step}: {wall:.0f} s, {processor:.0f} processor s", file=sys.stderr, flush=True)


def attach(training: Any, fresh: int = FRESH, every: int = EVERY) -> None:
    """Measure every step on its rollouts, and some a second time on fresh rollouts of prompts that are not trained."""
    EntropyInfluence(every=1).attach(training)
    prompts = [messages(task) for task in tasks("eval")[:fresh]]
    EntropyInfluence(every, prompts, completions_per_prompt=1, seed=1, name=SECOND).attach(training)


def train(arguments: argparse.Namespace) -> None:
    """Make or continue the training run; its last policy is in ``final`` when it is complete."""
    # The adapter is initialised before the trainer sets its own seed.
    torch.manual_seed(SEED)
    reward = {"solved": solved, "by_length": by_length}[arguments.reward]
    training = trainer(
        arguments.model,
        str(arguments.out),
        "lora",
        arguments.steps,
        of_sources(reward, arguments.sources),
        arguments.tokens,
        tasks("train"),
        {"target_modules": list(MODULES), "layers_to_transform": arguments.layers},
        per_device_train_batch_size=PROMPTS * COMPLETIONS,
        num_generations=COMPLETIONS,
        learning_rate=LEARNING_RATE,
        shuffle_dataset=False,
        save_strategy="steps",
        save_steps=SAVED,
        seed=SEED,
    )
    if arguments.attributed:
        attach(training)
    training.add_callback(Clock())
    checkpoint = get_last_checkpoint(str(arguments.out)) if arguments.out.is_dir() else None
    training.train(resume_from_checkpoint=checkpoint)
    training.model.save_pretrained(arguments.out / "final")
    write_json(arguments.out / "log.json", {"log": training.state.log_history})


def main(argv: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--out", type=Path, required=True, help="the trainer's output directory")
    command.add_argument("--model", type=Path, required=True, help="directory of the model")
    command.add_argument("--sources", nargs="+", default=list(SOURCES), help="those whose rewards are not silenced")
    command.add_argument("--attributed", action="store_true", help="measure the steps")
    command.add_argument("--steps", type=int, required=True)
    command.add_argument("--tokens", type=int, required=True, help="length of the longest completion")
    command.add_argument("--layers", type=int, nargs="+", required=True, help="those that get adapters")
    command.add_argument("--reward", choices=["solved", "by_length"], default="solved")
    arguments = command.parse_args(argv)
    one_thread()
    with quiet():
        train(arguments)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
