"""Measure a real GRPO training run: the cost of attaching, and the predicted against the measured entropy.

    python -m benchmarks trl_run            writes results/trl_run.json and .svg and the table in README.md; ten minutes
    python -m benchmarks trl_run --quick    a few steps, written nowhere, to check that it works

The embedded policy is trained further on its arithmetic with trl's ``GRPOTrainer``: 64 rollouts per step (8 prompts x
8), E of 128 (64 held-out prompts x 2). The cost is the time of training runs of ten steps, with and without measuring
in turn.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.harness import COSTS, RESULTS, one_thread, parser, ratios, store, svg_figure
from benchmarks.trl.variants import QUIET_ON_CPU, quiet
from fx_influence.interop.prompts import read_prompts
from fx_influence.interop.rewards import exact_match
from fx_influence.interop.runtime.environment import environment
from fx_influence.interop.runtime.renamed import current_summary
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.lab.plan import demo_path

NAME = "bench_trl_run"
STEPS, LR, EVALUATED = 100, 2e-5, 64


def trainer(
    out: str,
    steps: int,
    rows: list[dict[str, Any]] | None = None,
    peft_config: LoraConfig | None = None,
    model: Any = None,
    reward: Callable[..., list[float]] = exact_match,
    **more: Any,
) -> GRPOTrainer:
    """Return a trainer of the embedded policy, or of another with its tokenizer, with a new optimizer.

    Args:
        out: the trainer's directory.
        steps: number of optimizer steps.
        rows: records of the prompts; None takes those that the policy was trained on.
        peft_config: of an adapter to train in place of the weights.
        model: the policy, by default the embedded one.
        reward: of its completions.
        **more: further options of the config.
    """
    policy = demo_path("demo")
    if rows is None:
        rows = [{"prompt": p.text, **p.columns} for p in read_prompts(demo_path("demo/train"))]
    config: dict[str, Any] = {
        "output_dir": out,
        "learning_rate": LR,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
        "per_device_train_batch_size": 64,
        "num_generations": 8,
        "max_completion_length": 20,
        "max_steps": steps,
        **QUIET_ON_CPU,
        **more,
    }
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32) if model is None else model,
        args=GRPOConfig(**config),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(policy),
        peft_config=peft_config,
    )


def attach(training: GRPOTrainer, every: int) -> EntropyInfluence:
    """Attach the measurement to a trainer, with E from the held-out prompts."""
    prompts = [p.text for p in read_prompts(demo_path("demo/eval"))][:EVALUATED]
    return EntropyInfluence(every, prompts, completions_per_prompt=2).attach(training)


def costs(steps: int, pairs: int) -> dict[str, dict[str, float]]:
    """Return seconds of a training run over those of a plain one, by how often it is measured."""

    def work(every: int | None) -> Callable[[], object]:
        def train() -> None:
            with tempfile.TemporaryDirectory() as out, quiet():
                training = trainer(out, steps)
                if every is not None:
                    attach(training, every)
                training.train()

        return train

    return ratios({"every=1": work(1), "every=10": work(10)}, work(None), pairs)


def measured_run(steps: int) -> dict[str, Any]:
    """Return every step's figures, and how well the predicted changes explain the measured ones."""
    with tempfile.TemporaryDirectory() as out, quiet():
        training = trainer(out, steps)
        history = attach(training, 1).history
        training.train()
    # The first step of a warm-up, with lr 0, changes nothing.
    changing = [h for h in history if h["lr"]]
    total, measured, stderr = (np.array([h[name] for h in changing]) for name in ("total", "measured", "stderr"))
    return {
        "history": history,
        "correlation": float(np.corrcoef(total, measured)[0, 1]),
        "r2": float(1 - ((measured - total) ** 2).sum() / ((measured - measured.mean()) ** 2).sum()),
        "median_relative_error": float(np.median(np.abs(total - measured) / np.abs(measured))),
        "median_stderr_over_total": float(np.median(stderr / np.abs(total))),
        "sum_total": float(total.sum()),
        "sum_realised": float(measured.sum()),
        **{f"sum_{name}": float(sum(h[name] for h in history)) for name in ("momentum", "weight_decay", "rollouts")},
        "entropy_first": history[0]["entropy"],
        "entropy_last": history[-1]["entropy"],
        "median_seconds": statistics.median(h["seconds"] for h in history),
    }


def plot(run: dict[str, Any], path: Path) -> None:
    """Draw predicted and measured changes step by step, and their sums beside the estimated entropy."""
    # Stored figures of version 0.1 have the old names.
    history = [current_summary(step) for step in run["history"]]
    step, total, measured, error, entropy = (
        np.array([h[name] for h in history]) for name in ("step", "total", "measured", "stderr", "entropy")
    )
    with svg_figure(path, 1, 2, (9, 3.4)) as [[left, right]]:
        left.errorbar(measured, total, yerr=error, fmt="o", ms=3, lw=0.8, color="#0072B2", ecolor="#9ECAE1")
        ends = [min(measured.min(), total.min()), max(measured.max(), total.max())]
        left.plot(ends, ends, color="black", lw=0.8)
        left.set(xlabel="ΔH measured in a step, nats", ylabel="ΔH predicted ± stderr, nats")
        right.plot(step, entropy, "o", ms=3, color="#999999", label="H on fresh E before the step")
        # One draw of E is too noisy a start, so the level of the sums is fitted to all of them.
        start = (entropy - measured.cumsum() + measured).mean()
        for values, name, color in ((measured, "measured", "#D55E00"), (total, "predicted", "#0072B2")):
            summed = start + np.concatenate([[0.0], values.cumsum()])
            right.plot(
                np.append(step, step[-1] + 1), summed, label=f"sum of ΔH {name}, level fitted", color=color, lw=1.2
            )
        right.set(xlabel="optimizer step", ylabel="entropy, nats per token")
        right.legend(frameon=False, fontsize=8)


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the page."""
    run, cost = report["run"], report["cost"]
    lines = [
        "| | |",
        "|---|---|",
        f"| seconds with `every=1` / without, median of {report['pairs']} pairs | {cost['every=1']['median']:.2f} |",
        f"| seconds with `every=10` / without | {cost['every=10']['median']:.2f} |",
        f"| steps measured, seconds each | {len(run['history'])}, {run['median_seconds']:.2f} |",
        f"| correlation of ΔH predicted and measured | {run['correlation']:.3f} |",
        f"| R² of ΔH predicted for ΔH measured | {run['r2']:.3f} |",
        f"| sum of ΔH predicted, of it momentum, rollouts | {run['sum_total']:+.4f}, {run['sum_momentum']:+.4f}, "
        f"{run['sum_rollouts']:+.4f} |",
        f"| sum of ΔH measured; entropy before, after | {run['sum_realised']:+.4f}; {run['entropy_first']:.4f}, "
        f"{run['entropy_last']:.4f} |",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__, "a few steps, written nowhere").parse_args(argv)
    one_thread()
    steps, cost_steps, pairs = (3, 2, 1) if arguments.quick else (STEPS, 10, 11)
    run = measured_run(steps)
    report = {
        "environment": environment(),
        "pairs": pairs,
        "run": run,
        "cost": costs(cost_steps, pairs),
    }
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {COSTS: {NAME: markdown(report)}})
        plot(run, RESULTS / "trl_run.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
