"""A real GRPO training, measured: what attaching costs, and the entropy foretold against the entropy realised.

    python -m benchmarks trl_run            writes results/trl_run.json and .svg and the README's table; ten minutes
    python -m benchmarks trl_run --quick    a few steps, written nowhere: it only shows that this works

The embedded policy learns its arithmetic further with trl's ``GRPOTrainer``: 64 rollouts a step (8 prompts x 8), E of
128 (64 held-out prompts x 2). The cost is the time of whole trainings of ten steps, measured and plain in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.harness import README, RESULTS, drawn, one_thread, ratios, store
from benchmarks.trl_variants import quiet
from fx_influence.interop.prompts import read_prompts
from fx_influence.interop.rewards import exact_match
from fx_influence.interop.runtime.environment import environment
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.lab.plan import demo_path

NAME = "bench_trl_run"
STEPS, LR, EVALUATED = 100, 2e-5, 64


def trainer(out: str, steps: int) -> GRPOTrainer:
    """The embedded policy with a new optimizer and the prompts that it was trained on."""
    policy = demo_path("demo")
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
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        args=GRPOConfig(**config),
        reward_funcs=exact_match,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )


def attached(training: GRPOTrainer, every: int) -> EntropyInfluence:
    prompts = [p.text for p in read_prompts(demo_path("demo/eval"))][:EVALUATED]
    return EntropyInfluence(every, prompts, completions_per_prompt=2).attach(training)


def costs(steps: int, pairs: int) -> dict[str, dict[str, float]]:
    """Seconds of a training over those of a plain one, by how often it is measured; the model is loaded outside."""

    def work(every: int | None) -> Callable[[], object]:
        def train() -> None:
            with tempfile.TemporaryDirectory() as out, quiet():
                training = trainer(out, steps)
                if every is not None:
                    attached(training, every)
                training.train()

        return train

    return ratios({"every=1": work(1), "every=10": work(10)}, work(None), pairs)


def measured_run(steps: int) -> dict[str, Any]:
    """Every step's figures, and how well the foretold explains the realised."""
    with tempfile.TemporaryDirectory() as out, quiet():
        training = trainer(out, steps)
        history = attached(training, 1).history
        training.train()
    # A warm-up's first step, with lr 0, moves nothing.
    moved = [h for h in history if h["lr"]]
    total, realised, stderr = (np.array([h[name] for h in moved]) for name in ("total", "measured", "stderr"))
    return {
        "history": history,
        "correlation": float(np.corrcoef(total, realised)[0, 1]),
        "r2": float(1 - ((realised - total) ** 2).sum() / ((realised - realised.mean()) ** 2).sum()),
        "median_relative_error": float(np.median(np.abs(total - realised) / np.abs(realised))),
        "median_stderr_over_total": float(np.median(stderr / np.abs(total))),
        "sum_total": float(total.sum()),
        "sum_realised": float(realised.sum()),
        **{f"sum_{name}": float(sum(h[name] for h in history)) for name in ("momentum", "weight_decay", "rollouts")},
        "entropy_first": history[0]["entropy"],
        "entropy_last": history[-1]["entropy"],
        "median_seconds": statistics.median(h["seconds"] for h in history),
    }


def plot(run: dict[str, Any], path: Path) -> None:
    """Entropy foretold and realised step by step, and their sums beside the entropy measured."""
    history = run["history"]
    step, total, realised, error, entropy = (
        np.array([h[name] for h in history]) for name in ("step", "total", "measured", "stderr", "entropy")
    )
    with drawn(path, 1, 2, (9, 3.4)) as [[left, right]]:
        left.errorbar(realised, total, yerr=error, fmt="o", ms=3, lw=0.8, color="#0072B2", ecolor="#9ECAE1")
        ends = [min(realised.min(), total.min()), max(realised.max(), total.max())]
        left.plot(ends, ends, color="black", lw=0.8)
        left.set(xlabel="ΔH realised in a step, nats", ylabel="ΔH foretold ± stderr, nats")
        right.plot(step, entropy, "o", ms=3, color="#999999", label="H on fresh E before the step")
        # One draw of E is too noisy a start, so the sums begin where they fit all of them.
        start = (entropy - realised.cumsum() + realised).mean()
        for values, name, color in ((realised, "realised", "#D55E00"), (total, "foretold", "#0072B2")):
            summed = start + np.concatenate([[0.0], values.cumsum()])
            right.plot(
                np.append(step, step[-1] + 1), summed, label=f"sum of ΔH {name}, level fitted", color=color, lw=1.2
            )
        right.set(xlabel="optimizer step", ylabel="entropy, nats per token")
        right.legend(frameon=False, fontsize=8)


def markdown(report: dict[str, Any]) -> str:
    """The README's table."""
    run, cost = report["run"], report["cost"]
    lines = [
        "| | |",
        "|---|---|",
        f"| training with `every=1` / without, median of {report['pairs']} pairs | {cost['every=1']['median']:.2f} |",
        f"| training with `every=10` / without | {cost['every=10']['median']:.2f} |",
        f"| steps measured, seconds each | {len(run['history'])}, {run['median_seconds']:.2f} |",
        f"| correlation of ΔH foretold and realised | {run['correlation']:.3f} |",
        f"| R² of ΔH foretold for ΔH realised | {run['r2']:.3f} |",
        f"| sum of ΔH foretold, of it momentum, rollouts | {run['sum_total']:+.4f}, {run['sum_momentum']:+.4f}, "
        f"{run['sum_rollouts']:+.4f} |",
        f"| sum of ΔH realised; entropy before, after | {run['sum_realised']:+.4f}; {run['entropy_first']:.4f}, "
        f"{run['entropy_last']:.4f} |",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps, written nowhere")
    arguments = parser.parse_args(argv)
    one_thread()
    steps, of_cost, pairs = (3, 2, 1) if arguments.quick else (STEPS, 10, 11)
    run = measured_run(steps)
    report = {
        "environment": environment(),
        "pairs": pairs,
        "run": run,
        "cost": costs(of_cost, pairs),
    }
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {README: markdown(report)})
        plot(run, RESULTS / "trl_run.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
