"""Measure GRPO training runs of a pretrained chat model, SmolLM2-135M-Instruct: cost, memory and truth of attributing.

    python -m benchmarks real_model            writes results/real_model.json and the table in README.md; an hour or two
    python -m benchmarks real_model --quick    a tiny random model of the same class, written nowhere
    python -m benchmarks.real.bench_real_model --collect    stores what an interrupted benchmark has measured so far

For each variant (LoRA or all weights, in float32 or under bfloat16 autocast, E the step's own rollouts or fresh ones) a
training run on tasks of reasoning-gym, every step measured: the processor seconds and the peak of resident memory of
sampling, training and attribution, the consistency checks, and the change of entropy predicted and measured. Figures
are stored after each variant; an interrupted benchmark keeps the variants that it has completed, and those of the
interrupted one are written after every step.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fx_influence as fx
from benchmarks.harness import COSTS, RETURN_FREED_MEMORY, ROOT, one_thread, parser, store
from benchmarks.real.language_model import FOLDER, prepare_model, prepare_verifiers, tiny_model
from benchmarks.real.training_run import (
    ATTRIBUTION,
    COMPLETIONS,
    HELD_OUT,
    PHASES,
    PROMPTS,
    SAMPLING,
    TOKENS,
    TRAINING,
)
from fx_influence.attribution.display import ILL_CONDITIONED
from fx_influence.interop.runtime.environment import environment

NAME = "bench_real_model"
QUICK_TOKENS = 6
CHECKS = ("residual", "unattributed", "rounding")


class Variant(NamedTuple):
    """A training run: ``minutes`` is the time after which no step of it begins."""

    weights: str
    precision: str
    evaluation: str
    steps: int
    minutes: float

    @property
    def name(self) -> str:
        weights = "LoRA" if self.weights == "lora" else "full"
        return f"{weights}, {self.precision}, {EVALUATIONS[self.evaluation]}"


EVALUATIONS = {"batch": "on its own rollouts", "fresh": "fresh E"}
VARIANTS = (
    Variant("lora", "float32", "batch", 20, 60.0),
    Variant("full", "float32", "batch", 20, 60.0),
    Variant("lora", "float32", "fresh", 5, 30.0),
    Variant("full", "float32", "fresh", 5, 30.0),
    Variant("lora", "bfloat16", "batch", 5, 30.0),
    Variant("full", "bfloat16", "batch", 5, 30.0),
)
QUICK = (Variant("full", "bfloat16", "batch", 2, 5.0),)


def steps_file(variant: Variant, folder: Path) -> Path:
    """Return the file into which a training run writes its steps."""
    return folder / f"steps_{variant.weights}_{variant.precision}_{variant.evaluation}.json"


def is_complete(file: Path) -> bool:
    """Return whether a training run has written its last step."""
    return file.exists() and bool(json.loads(file.read_text(encoding="utf-8"))["complete"])


def train(variant: Variant, model: Path, folder: Path, reward: str, tokens: int) -> None:
    """Make one training run in a fresh process; its steps are in ``steps_file``."""
    options = {
        "out": steps_file(variant, folder),
        "model": model,
        "weights": variant.weights,
        "precision": variant.precision,
        "evaluation": variant.evaluation,
        "steps": variant.steps,
        "minutes": variant.minutes,
        "tokens": tokens,
        "reward": reward,
    }
    command = [sys.executable, "-m", "benchmarks.real.training_run"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environ = {**RETURN_FREED_MEMORY, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, cwd=ROOT, check=True, env=environ)


def results(variants: Sequence[Variant], folder: Path) -> list[dict[str, Any]]:
    """Return the steps measured of each training run, with their summary, as far as there are some."""
    runs = []
    for variant in variants:
        if (file := steps_file(variant, folder)).exists():
            steps = json.loads(file.read_text(encoding="utf-8"))["steps"]
            runs.append({**variant._asdict(), "name": variant.name, "summary": summary(steps), "measured": steps})
    return runs


def summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the table shows of the steps of a training run."""
    seconds = {phase: [step["processor_seconds"][phase] for step in steps] for phase in PHASES}
    # A step whose prompts all have equal rewards has no influences to compare with.
    informative = [step for step in steps if step["sum_absolute"] > 0]
    steady = [step for step in steps if step["conditioning"] <= ILL_CONDITIONED]
    return {
        "attribution_over_training": statistics.median(
            a / b for a, b in zip(seconds[ATTRIBUTION], seconds[TRAINING], strict=True)
        ),
        # A step with the attribution over the same step without it; every tenth step pays a tenth of it on average.
        "every_1": 1 + added(steps),
        "every_10": 1 + added(steps) / 10,
        "every_1_informative": 1 + added(informative),
        "processor_seconds": {phase: statistics.median(values) for phase, values in seconds.items()},
        "peak_bytes": {phase: max(step["peak_bytes"][phase] for step in steps) for phase in PHASES},
        "informative": len(informative),
        **{
            # Without a second method there is no rounding to measure.
            name: max((abs(step[name]) / step["sum_absolute"] for step in informative if name in step), default=None)
            for name in CHECKS
        },
        "agreement": agreement(steps),
        "steady": len(steady),
        "steady_agreement": agreement(steady),
        "sum_total": sum(step["total"] for step in steps),
        "sum_measured": sum(step["measured"] for step in steps),
        "noise": statistics.median(
            [step["stderr"] / abs(step["total"]) for step in informative if step["total"]] or [math.nan]
        ),
    }


def added(steps: list[dict[str, Any]]) -> float:
    """Return the median of the attribution's processor seconds over those of the same step, sampling and all."""
    by_step = [step["processor_seconds"] for step in steps]
    return statistics.median([x[ATTRIBUTION] / (x[SAMPLING] + x[TRAINING]) for x in by_step] or [math.nan])


def agreement(steps: list[dict[str, Any]]) -> dict[str, float] | None:
    """Return how Delta H predicted agrees with Delta H measured; None for fewer than three steps.

    ``correlation``, ``r2`` of measured by predicted, and ``explained``, the share of steps whose 95% interval of
    measured - predicted includes 0.
    """
    if len(steps) < 3:
        return None
    total, measured = (np.array([step[name] for step in steps]) for name in ("total", "measured"))
    half_widths = fx.interval_half_width(
        np.array([step["unexplained_stderr"] for step in steps]),
        np.array([step["measured_degrees_of_freedom"] for step in steps]),
    )
    scatter = float(((measured - measured.mean()) ** 2).sum())
    return {
        "correlation": float(np.corrcoef(total, measured)[0, 1]),
        "r2": 1 - float(((measured - total) ** 2).sum()) / scatter,
        "explained": float((np.abs(measured - total) <= half_widths).mean()),
    }


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the page: a column for each training run."""
    runs = [(run, run["summary"]) for run in report["runs"]]

    def row(label: str, cells: list[str]) -> str:
        return "| " + " | ".join([label, *cells]) + " |"

    def gigabytes(figures: dict[str, Any], phase: str) -> str:
        return f"{figures['peak_bytes'][phase] / 1e9:.2f}"

    def check(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    def agreements(figures: dict[str, float] | None) -> str:
        if figures is None:
            return ""
        return f"{figures['correlation']:.2f}, {figures['r2']:.2f}, {figures['explained']:.0%}"

    def seconds(figures: dict[str, Any]) -> str:
        return ", ".join(f"{figures['processor_seconds'][phase]:.1f}" for phase in PHASES)

    lines = [
        row(f"{report['model']}", [run["name"] for run, _ in runs]),
        row("---", ["---"] * len(runs)),
        row(
            "steps measured, those with unequal rewards",
            [f"{len(run['measured'])}, {s['informative']}" for run, s in runs],
        ),
        row("processor seconds of sampling, training step, attribution", [seconds(s) for _, s in runs]),
        row("attribution / training step", [f"{s['attribution_over_training']:.2f}" for _, s in runs]),
        row("step with sampling, `every=1` / without", [f"{s['every_1']:.2f}" for _, s in runs]),
        row("the same of steps with unequal rewards", [f"{s['every_1_informative']:.2f}" for _, s in runs]),
        row("of all with `every=10`, computed", [f"{s['every_10']:.2f}" for _, s in runs]),
        row(
            "peak of resident memory, GB: training, attribution",
            [f"{gigabytes(s, TRAINING)}, {gigabytes(s, ATTRIBUTION)}" for _, s in runs],
        ),
        row("residual, largest, over Σ\\|δ\\|", [check(s["residual"]) for _, s in runs]),
        row("unattributed, the same", [check(s["unattributed"]) for _, s in runs]),
        row("rounding, the same", [check(s["rounding"]) for _, s in runs]),
        row("standard error / \\|ΔH predicted\\|, median", [f"{s['noise']:.2f}" for _, s in runs]),
        row(
            "ΔH predicted and measured: correlation, R², steps with 0 in their difference's 95% interval",
            [agreements(s["agreement"]) for _, s in runs],
        ),
        row(
            f"steps of `conditioning` up to {ILL_CONDITIONED}; the same three of them",
            [", ".join(filter(None, (str(s["steady"]), agreements(s["steady_agreement"])))) for _, s in runs],
        ),
        row(
            "sum of ΔH predicted, measured",
            [f"{s['sum_total']:+.4f}, {s['sum_measured']:+.4f}" for _, s in runs],
        ),
    ]
    return "\n".join(lines)


def report_of(model: str, tokens: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the report of training runs."""
    batches = {"u": [PROMPTS, COMPLETIONS], "fresh e": [HELD_OUT, 1], "tokens": tokens}
    return {"environment": environment(), "model": model, "batches": batches, "runs": runs}


def store_results() -> None:
    """Write the figures of all training runs so far, and their table."""
    report = report_of("SmolLM2-135M-Instruct", TOKENS, results(VARIANTS, FOLDER))
    store(NAME, report, {COSTS: {NAME: markdown(report)}})
    print(markdown(report), flush=True)


def main(argv: list[str] | None = None) -> int:
    command = parser(__doc__, "a tiny random model, written nowhere")
    command.add_argument("--collect", action="store_true", help="store what an interrupted benchmark has measured")
    arguments = command.parse_args(argv)
    one_thread()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = tiny_model(folder / "model")
            for variant in QUICK:
                train(variant, model, folder, "by_length", QUICK_TOKENS)
            print(markdown(report_of("a tiny model", QUICK_TOKENS, results(QUICK, folder))))
        return 0
    if not arguments.collect:
        model = prepare_model()
        prepare_verifiers()
        for variant in VARIANTS:
            if not is_complete(steps_file(variant, FOLDER)):
                train(variant, model, FOLDER, "verified", TOKENS)
                store_results()
    store_results()
    for variant in VARIANTS:
        if is_complete(steps_file(variant, FOLDER)):
            steps_file(variant, FOLDER).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
