"""Every way of measuring a live training on a CPU: the processor seconds of a measured step, and its checks.

    python -m benchmarks frameworks            writes results/frameworks.json and the table in README.md; ten minutes
    python -m benchmarks frameworks --quick    two ways, one step, written nowhere

The embedded policy is trained on its own rollouts, 64 a step, in a fresh process or two for each way: in turn three
training runs without and three with every step measured, of which the first step is left out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft import LoraConfig
from transformers import TrainerCallback

import fx_influence as fx
from benchmarks.harness import COSTS, ROOT, one_thread, parser, store, write_json
from benchmarks.trl.bench_trl_run import trainer
from benchmarks.trl.variants import fsdp_on_cpu, prepare_deepspeed, quiet, zero_config
from fx_influence.interop.prompts import Prompt, read_prompts
from fx_influence.interop.rewards import exact_match
from fx_influence.interop.runtime.environment import environment
from fx_influence.interop.sampling import sample_rewarded
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.lab.plan import demo_path

NAME, MODULE = "bench_frameworks", "benchmarks.trl.bench_frameworks"
ROUNDS, STEPS = 3, 4


class Way(NamedTuple):
    """A way of training: ``options`` of the trainer's config, None for a loop without a trainer."""

    name: str
    options: Mapping[str, Any] | None = {}
    ranks: int = 1
    lora: bool = False


WAYS = (
    Way("own loop, `fx.attach`", None),
    Way("TRL"),
    Way("TRL, LoRA", lora=True),
    Way("TRL, 8-bit AdamW of bitsandbytes", {"optim": "adamw_8bit"}),
    Way("TRL, AdamW8bit of torchao", {"optim": "adamw_torch_8bit"}),
    Way("TRL, DistributedDataParallel", ranks=2),
    Way("TRL, FSDP2", {"fsdp": True, "fsdp_config": {"version": 2}}, ranks=2),
    Way("TRL, DeepSpeed ZeRO-2", {"deepspeed": zero_config(2)}, ranks=2),
    Way("TRL, DeepSpeed ZeRO-2, bfloat16", {"deepspeed": zero_config(2), "bf16": True}, ranks=2),
    Way("TRL, DeepSpeed ZeRO-3", {"deepspeed": zero_config(3)}, ranks=2),
)
QUICK = ("TRL, LoRA", "TRL, DistributedDataParallel")


class StepSeconds(TrainerCallback):
    """Callback that records the processor seconds of every step, sampling and measuring included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._since)


class Figures(NamedTuple):
    """Processor seconds of every step of a training run, and the history of the measured ones."""

    seconds: list[float]
    history: list[dict[str, float]]


def is_installed(way: Way) -> bool:
    """Return whether the packages of a way are there; DeepSpeed, which the environment lacks, may not be."""
    return "deepspeed" not in (way.options or {}) or importlib.util.find_spec("deepspeed") is not None


def train(way: Way, steps: int, measured: bool) -> Figures:
    """Make a training run with TRL, every step measured or none."""
    with tempfile.TemporaryDirectory() as out, quiet():
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if way.lora else None
        options = {"lr_scheduler_type": "constant", "warmup_steps": 0, **(way.options or {})}
        training = trainer(out, steps, peft_config=lora, **options)
        clock, history = StepSeconds(), []
        if measured:
            history = EntropyInfluence(1).attach(training).history
        # Last of the callbacks, so that its step holds those of all others.
        training.callback_handler.callbacks.append(clock)
        training.train()
    return Figures(clock.seconds, history)


def train_in_own_loop(steps: int, measured: bool) -> Figures:
    """Make a training run without a trainer, by the loop of fx_influence/interop/README.md."""
    state = fx.load_checkpoint(demo_path("demo"))
    model, prompts = state.model, read_prompts(demo_path("demo/train"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    capture = fx.attach(optimizer, model, every=1) if measured else None
    seconds = []
    for step in range(steps):
        since = time.process_time()
        own_step(state, optimizer, prompts[8 * step :][:8], step, capture)
        seconds.append(time.process_time() - since)
    return Figures(seconds, [] if capture is None else capture.history)


def own_step(state: Any, optimizer: torch.optim.AdamW, prompts: list[Prompt], step: int, capture: Any) -> None:
    """Sample eight completions of each prompt and make a step on them; ``capture`` takes it unless it is None."""
    rollouts = sample_rewarded(
        state.model,
        state.tokenizer,
        prompts,
        completions_per_prompt=8,
        seed=step,
        reward=exact_match,
        max_new_tokens=20,
        temperature=1.0,
    )
    u, advantages = fx.collate(rollouts, pad_id=0), torch.tensor([rollout.advantage for rollout in rollouts])
    ids, mask = u.input_ids, u.completion_mask[:, 1:]
    logprobs = state.model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    if capture is not None:
        capture.add(
            logprobs=logprobs,
            input_ids=ids,
            attention_mask=u.attention_mask,
            completion_mask=mask,
            advantages=advantages,
        )
    (-(advantages[:, None] * logprobs * mask).sum() / (20 * len(rollouts))).backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def measure(way: Way, rounds: int, steps: int) -> dict[str, Any]:
    """Return the figures of a way, from training runs without and with measuring in turn, in this process."""

    def work(measured: bool) -> Figures:
        return train_in_own_loop(steps, measured) if way.options is None else train(way, steps, measured)

    with ExitStack() as stack:
        if "fsdp" in (way.options or {}):
            stack.enter_context(fsdp_on_cpu())
        if "deepspeed" in (way.options or {}):
            prepare_deepspeed()
        if "torch" in str((way.options or {}).get("optim")):
            # torchao compiles its step, which takes longer than all of this.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        pairs = [(work(False), work(True)) for _ in range(rounds)]
    later = slice(1 if steps > 1 else 0, None)
    plain, measured = (statistics.median(s for pair in pairs for s in pair[k].seconds[later]) for k in range(2))
    history = [figures for _, run in pairs for figures in run.history]
    return {
        "plain": plain,
        "extra": measured - plain,
        "steps": len(history),
        "residual": largest(history, "residual"),
        "unattributed": largest(history, "unattributed"),
        "rounding": largest(history, "rounding"),
    }


def largest(history: list[dict[str, float]], name: str) -> float | None:
    """Return the largest size of a figure over the sum of the terms of the change; None where no step has it."""
    terms = ("rollouts", "momentum", "weight_decay")
    shares = (abs(h[name]) / sum(abs(h[term]) for term in terms) for h in history if name in h)
    return max(shares, default=None)


def measure_in_fresh_processes(way: Way, rounds: int, steps: int) -> dict[str, Any]:
    """Return what ``measure`` does on the way's ranks, that of the first."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={way.ranks}"]
        module = ["-m", MODULE, "--rank", str(out), way.name, str(rounds), str(steps)]
        command = [sys.executable, *(torchrun if way.ranks > 1 else []), *module]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return dict(json.loads(out.read_text(encoding="utf-8")))


def rank_main(out: str, name: str, rounds: str, steps: str) -> None:
    """Measure a way in this process, one of its ranks."""
    one_thread()
    [way] = [way for way in WAYS if way.name == name]
    figures = measure(way, int(rounds), int(steps))
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(Path(out), figures)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the page."""
    lines = [
        "| training of the embedded policy, 64 rollouts a step | processes | step, s | extra for measuring, s | "
        "residual | unattributed | rounding |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in report["ways"].items():
        values = (row[check] for check in ("residual", "unattributed", "rounding"))
        checks = ("" if value is None else f"{value:.1e}" for value in values)
        lines.append(f"| {name} | {row['ranks']} | {row['plain']:.2f} | {row['extra']:.2f} | {' | '.join(checks)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__, "two ways, one step, written nowhere").parse_args(argv)
    rounds, steps = (1, 1) if arguments.quick else (ROUNDS, STEPS)
    ways = [way for way in WAYS if (way.name in QUICK if arguments.quick else is_installed(way))]
    figures = {way.name: {"ranks": way.ranks, **measure_in_fresh_processes(way, rounds, steps)} for way in ways}
    report = {"environment": environment(), "rounds": rounds, "ways": figures}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {COSTS: {NAME: markdown(report)}})
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(*sys.argv[2:])
    else:
        sys.exit(main())
