"""A GRPO training run of a chat model, every step measured: seconds and peak memory by phase, and the step's figures.

    python -m benchmarks.real.training_run --out FILE --model FOLDER [--weights lora] [--precision float32] ...

``bench_real_model`` starts it in a fresh process for each variant, so that peaks of memory are its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.harness import one_thread, peak_bytes, reset_peak, write_json
from benchmarks.real.language_model import prepare_verifiers
from benchmarks.real.tasks import by_length, messages, tasks, verified
from benchmarks.trl.variants import QUIET_ON_CPU, quiet
from fx_influence.interop.prompts import Prompt
from fx_influence.interop.trl import EntropyInfluence

SAMPLING, TRAINING, ATTRIBUTION = PHASES = ("sampling", "training", "attribution")
LEARNING_RATES = {"full": 1e-5, "lora": 2e-4}
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
PROMPTS, COMPLETIONS = 4, 2
"""Prompts of a step and completions of each."""
HELD_OUT = 8
"""Held-out prompts of a fresh E, one completion of each: as many rollouts as in U."""
TOKENS = 24
"""Length of the longest completion."""


class PhaseClock:
    """Seconds, processor seconds and peak bytes of this process by phase; a phase within another is not part of it."""

    def __init__(self) -> None:
        self.phase = TRAINING
        self.start()

    def start(self) -> None:
        """Forget everything measured so far."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.processor_seconds: dict[str, float] = defaultdict(float)
        self.peak_bytes: dict[str, int] = defaultdict(int)
        reset_peak()
        self._since = (time.perf_counter(), time.process_time())

    def stop(self) -> None:
        """Add what has passed to the present phase."""
        now = (time.perf_counter(), time.process_time())
        self.seconds[self.phase] += now[0] - self._since[0]
        self.processor_seconds[self.phase] += now[1] - self._since[1]
        self.peak_bytes[self.phase] = max(self.peak_bytes[self.phase], peak_bytes())
        reset_peak()
        self._since = (time.perf_counter(), time.process_time())

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count the block to ``phase`` and what follows to the phase before."""
        self.stop()
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.stop()
            self.phase = outer

    def figures(self) -> dict[str, dict[str, float]]:
        """Return the measurements by name and phase."""
        names = ("seconds", "processor_seconds", "peak_bytes")
        return {name: dict(getattr(self, name)) for name in names}


class TimedInfluence(EntropyInfluence):
    """Callback that measures a step as its base does, and counts it to the phase ``attribution``."""

    def __init__(self, clock: PhaseClock, **settings: Any) -> None:
        super().__init__(**settings)
        self._clock = clock

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with self._clock.during(ATTRIBUTION):
            super().on_pre_optimizer_step(*args, **kwargs)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with self._clock.during(ATTRIBUTION):
            super().on_optimizer_step(*args, **kwargs)


class StepRecords(TrainerCallback):
    """Callback that appends the figures of every step to ``steps`` and writes them, and ends a run out of time."""

    def __init__(self, clock: PhaseClock, influence: EntropyInfluence, stored: Path, out: Path, minutes: float) -> None:
        self.steps: list[dict[str, Any]] = []
        self._clock, self._influence, self._stored, self._out = clock, influence, stored, out
        self._until = time.perf_counter() + 60 * minutes

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.stop()
        metrics = self._influence.history[-1]
        if metrics["step"] != state.global_step:
            raise RuntimeError(f"history has no step {state.global_step}; expected every step. Read its warning")
        step = self._stored / f"step_{state.global_step:06}"
        with np.load(step / "eval_00.npz") as arrays:
            absolute = float(metrics["lr"] * np.abs(arrays["per_sequence"]).sum())
        self.steps.append({**metrics, "sum_absolute": absolute, **self._clock.figures()})
        control.should_training_stop |= time.perf_counter() > self._until
        write_json(self._out, {"complete": control.should_training_stop, "steps": self.steps})


def trainer(
    model: Path,
    out: str,
    weights: str,
    steps: int,
    reward: Any,
    max_new_tokens: int,
    prompts: Sequence[Prompt] | None = None,
    adapters: Mapping[str, Any] | None = None,
    **more: Any,
) -> Any:
    """Return a GRPO trainer of a chat model on conversations.

    Args:
        model: directory of the model.
        out: the trainer's output directory.
        weights: "full" or "lora".
        steps: number of optimizer steps.
        reward: a reward function.
        max_new_tokens: length of the longest completion.
        prompts: conversations with the columns that the reward reads, by default the training tasks.
        adapters: options of LoRA that differ from ``LORA``.
        more: further options of the config.
    """
    rows = [{"prompt": messages(task), **task.columns} for task in prompts or tasks("train")]
    config: dict[str, Any] = {
        "output_dir": out,
        "learning_rate": LEARNING_RATES[weights],
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": PROMPTS * COMPLETIONS,
        "num_generations": COMPLETIONS,
        "max_completion_length": max_new_tokens,
        "max_steps": steps,
        **QUIET_ON_CPU,
        # TRL's default computes every forward twice, which would make attributing look cheaper.
        "gradient_checkpointing": False,
        **more,
    }
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=GRPOConfig(**config),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **{**LORA, **(adapters or {})}) if weights == "lora" else None,
    )


def count_sampling(training: Any, clock: PhaseClock) -> None:
    """Count the sampling of U, with its rewards, to the phase ``sampling``."""
    generate = training._generate_and_score_completions

    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.during(SAMPLING):
            return generate(*args, **kwargs)

    training._generate_and_score_completions = timed


def main(argv: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--out", type=Path, required=True, help="file of the figures, written after every step")
    command.add_argument("--model", type=Path, required=True, help="directory of the model")
    command.add_argument("--weights", choices=["full", "lora"], default="lora")
    command.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the autocast")
    command.add_argument("--evaluation", choices=["batch", "fresh"], default="batch", help="E: the step's, or fresh")
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("--minutes", type=float, default=60.0, help="no step begins later")
    command.add_argument("--tokens", type=int, default=TOKENS, help="length of the longest completion")
    command.add_argument("--reward", choices=["verified", "by_length"], default="verified")
    arguments = command.parse_args(argv)
    one_thread()
    # The peak of the first step is not that of importing the verifiers.
    if arguments.reward == "verified":
        prepare_verifiers()
        import reasoning_gym  # noqa: F401
    clock = PhaseClock()
    with tempfile.TemporaryDirectory() as out, quiet():
        training = trainer(
            arguments.model,
            out,
            arguments.weights,
            arguments.steps,
            {"verified": verified, "by_length": by_length}[arguments.reward],
            arguments.tokens,
            bf16=arguments.precision == "bfloat16",
        )
        held_out = [messages(task) for task in tasks("eval")[:HELD_OUT]]
        fresh = {"eval_prompts": held_out, "completions_per_prompt": 1} if arguments.evaluation == "fresh" else {}
        influence = TimedInfluence(clock, every=1, **fresh).attach(training)
        count_sampling(training, clock)
        stored = Path(out) / "entropy_influence"
        training.add_callback(StepRecords(clock, influence, stored, arguments.out, arguments.minutes))
        training.train()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
