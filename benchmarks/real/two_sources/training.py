"""A GRPO training run on the tasks of two sources, attributed or not, which continues where it was stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.real.tasks import messages
from benchmarks.real.training_run import trainer
from benchmarks.real.two_sources.tasks import of_sources, tasks
from fx_influence.interop.trl import EntropyInfluence

PROMPTS, COMPLETIONS = 6, 2
"""Prompts of a step, half of them of each source, and completions of each."""
SECOND = "second"
"""Name of the callback whose E are fresh rollouts of other prompts."""
SEED = 0
LEARNING_RATE = 5e-4
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers that get adapters."""


class Settings(NamedTuple):
    """Settings that the training runs of a benchmark have in common.

    Attributes:
        model: directory of the model.
        layers: those that get adapters.
        reward: a reward function.
        steps: number of optimizer steps.
        tokens: length of the longest completion.
        saved: steps from one checkpoint to the next.
        every: steps from one second E to the next.
        fresh: rollouts of a second E, each of another prompt.
    """

    model: Path
    layers: Sequence[int]
    reward: Callable[..., list[float]]
    steps: int
    tokens: int
    saved: int
    every: int
    fresh: int


class Clock(TrainerCallback):
    """Callback that prints each step with the wall-clock and processor seconds since the training run began."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = (time.perf_counter(), time.process_time())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wall, processor = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        print(f"step {state.global_step}: {wall:.0f} s, {processor:.0f} processor s", file=sys.stderr, flush=True)


def train(out: Path, settings: Settings, sources: Sequence[str], attributed: bool) -> None:
    """Make a training run, or continue it from its last checkpoint.

    Prompts, seeds and steps are the same whatever the sources: rewards of other sources are 0, so that their rollouts
    are sampled and have no advantages.

    Args:
        out: the trainer's output directory.
        settings: of all training runs.
        sources: those whose rewards are not silenced.
        attributed: whether to measure every step on its rollouts, and some a second time on fresh rollouts.
    """
    # The adapter is initialised before the trainer sets its own seed.
    torch.manual_seed(SEED)
    training = trainer(
        settings.model,
        str(out),
        "lora",
        settings.steps,
        of_sources(settings.reward, sources),
        settings.tokens,
        tasks("train"),
        {"target_modules": list(MODULES), "layers_to_transform": list(settings.layers)},
        per_device_train_batch_size=PROMPTS * COMPLETIONS,
        num_generations=COMPLETIONS,
        learning_rate=LEARNING_RATE,
        shuffle_dataset=False,
        save_strategy="steps",
        save_steps=settings.saved,
        seed=SEED,
    )
    if attributed:
        _attach(training, settings)
    training.add_callback(Clock())
    training.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)


def _attach(training: Any, settings: Settings) -> None:
    EntropyInfluence(every=1).attach(training)
    prompts = [messages(task) for task in tasks("eval")[: settings.fresh]]
    EntropyInfluence(settings.every, prompts, completions_per_prompt=1, seed=1, name=SECOND).attach(training)


def saved_policies(out: Path) -> dict[int, Path]:
    """Return the adapters of a training run by the number of steps that they have made, in order."""
    folders = {int(path.name.partition("-")[2]): path for path in out.glob("checkpoint-*") if path.is_dir()}
    return dict(sorted(folders.items()))


def last_step(out: Path) -> int:
    """Return how many steps a training run has made for certain, by its last checkpoint."""
    return max(saved_policies(out), default=0)
