"""Is the change of entropy in each step of a pretrained chat model as predicted, on rollouts that predicted nothing?

    python -m benchmarks real_prediction            SmolLM2-135M-Instruct with LoRA; a minute a step, 100 steps,
                                                    resumed at the step at which it stopped
    python -m benchmarks real_prediction --quick    a tiny random model, written nowhere
    python -m benchmarks.real.bench_real_prediction --collect    stores the steps that an interrupted benchmark has made

Before each step of a GRPO run on tasks of reasoning-gym, lr times the influences' total on rollouts of held-out prompts
predicts its change of entropy, with an error bar. The step is made, and the change measured by importance sampling on
the same rollouts, on fresh ones of their prompts, and on rollouts of other prompts; prompts are new in every step. R²
is of the prediction itself, with no line fitted. The field's proxies, added up over the step's tokens, have no unit, so
that theirs is with the slope that suits these very steps best.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.bench_prediction import OTHER, SAME, evaluate, plot
from benchmarks.harness import EVIDENCE, format_interval, one_thread, parser, result_path, store
from benchmarks.real.language_model import FOLDER, prepare_model, prepare_verifiers, tiny_model
from benchmarks.real.predicted_run import (
    E_ITSELF,
    MEASURED,
    Settings,
    held_out_tasks,
    stored_steps,
    train,
    training_tasks,
)
from benchmarks.real.prediction_figures import (
    REGRESSED,
    averaged_rows,
    figures_of,
    in_windows,
    measured_rows,
    measurement_rows,
    regressions,
)
from benchmarks.real.pretrained_states import MODEL
from benchmarks.real.tasks import by_length, tasks, verified
from fx_influence.estimators.stderr import degrees_of_sum, interval_half_width
from fx_influence.interop.runtime.environment import environment

NAME, PAGE = "bench_real_prediction", EVIDENCE
STEPS, TOKENS, EVALUATED = 100, 16, 16
LAYERS = range(24, 30)
"""Layers with adapters, the last of 30: a step then costs little more than its forward passes."""
LEARNING_RATE = 2e-4
WINDOWS = (1, 5, 10, 20)
"""Numbers of consecutive steps that are added up."""


def report_of(steps: Sequence[Mapping[str, Any]], policy: str, settings: Settings) -> dict[str, Any]:
    """Return the report of the steps made so far."""
    lengths = [length for length in WINDOWS if len(steps) // length > 2]
    every = {kind: measured_rows(steps, kind) for kind in MEASURED}
    later = [k for k, step in enumerate(steps) if "without_score" in step["predicted"]]
    every |= {BY_MEASUREMENT: measurement_rows(steps), BY_BOTH: averaged_rows(steps)}
    return {
        "environment": environment(),
        "policy": policy,
        "settings": {
            **{name: getattr(settings, name) for name in ("lr", "steps", "tokens", "evaluated")},
            "layers": list(settings.layers),
        },
        "windows": {
            kind: {str(length): figures_of(in_windows(rows, length), settings.lr) for length in lengths}
            for kind, rows in every.items()
        },
        "regressed": regressions(steps, range(len(steps))),
        "regressed_later": regressions(steps, later) if 2 < len(later) < len(steps) else {},
        "trusted_lrs": evaluate(measured_rows(steps, OTHER), settings.lr)["trusted_lrs"],
        "steps": list(steps),
    }


BY_MEASUREMENT, BY_BOTH = "other, by same", "other, by both"


LABELS = {
    E_ITSELF: "E itself",
    SAME: "fresh rollouts of E's prompts",
    OTHER: "rollouts of other prompts",
    BY_MEASUREMENT: "other prompts, predicted by the change measured on E's",
    BY_BOTH: "other prompts, predicted by the mean of both",
}
WITHOUT_ERROR_BARS = (E_ITSELF, BY_BOTH)
"""Kinds whose prediction and measurement, or two predictions, have noise in common that error bars do not tell."""


def markdown(report: Mapping[str, Any]) -> str:
    """Return the tables of predicted and measured changes, of their sums, and of predictors."""
    tables = [predictions_table(report), sums_table(report), predictors_table(report["regressed"], "predictor")]
    if later := report["regressed_later"]:
        first = next(step["step"] for step in report["steps"] if "without_score" in step["predicted"])
        tables.append(predictors_table(later, f"predictor, from step {first} on"))
    return "\n\n".join(tables)


def predictions_table(report: Mapping[str, Any]) -> str:
    """Return the table by the rollouts that a change is measured on and the steps added up."""
    title = f"{report['policy']}, lr {report['settings']['lr']:g}"
    lines = [
        f"| {title}; measured on | steps added up | sums | R² | explainable R² | R² by the error bars "
        "| correlation | errors / error bars | in their 95% interval |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, windows in report["windows"].items():
        for length, x in windows.items():
            bars = ["", "", ""]
            if kind not in WITHOUT_ERROR_BARS:
                bars = [f"{x['expected']:.2f}", f"{x['spread']:.2f}", f"{x['covered']:.0%}"]
            cells = [format_interval(x["r2"], ".2f"), f"{x['explainable']:.2f}", bars[0]]
            cells += [format_interval(x["correlation"], ".2f"), *bars[1:]]
            lines.append(f"| {LABELS[kind]} | {length} | {x['count']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sums_table(report: Mapping[str, Any]) -> str:
    """Return the table of the sums over the training run."""
    steps = report["steps"]
    sums = {name: sum(step["predicted"][name] for step in steps) for name in ("momentum", "rollouts", "weight_decay")}
    cells = {
        "predicted": sum_with_interval([step["predicted"] for step in steps], "total", "total_stderr"),
        "of it momentum, the steps' rollouts, weight decay": ", ".join(f"{x:+.3f}" for x in sums.values()),
        **{
            f"measured on {LABELS[kind]}": sum_with_interval([x["measured"][kind] for x in steps], "delta_h", "stderr")
            for kind in MEASURED
        },
        "entropy of E per token, first and last ten steps": ", ".join(
            f"{np.mean([step['predicted']['entropy'] for step in part]):.2f}" for part in (steps[:10], steps[-10:])
        ),
        "η_trust / lr, median": f"{report['trusted_lrs']:.1f}",
        "noise share of the rollouts' influences, median": f"{np.median(shares(steps)):.2f}",
        "steps in which no rollout has an advantage": f"{sum(not step['with_advantage'] for step in steps)}",
    }
    lines = [f"| sums over {len(steps)} steps, nats | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {cell} |" for name, cell in cells.items()])


def shares(steps: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the noise shares of the steps in which a rollout has an influence."""
    return [step["predicted"]["noise_share"] for step in steps if "noise_share" in step["predicted"]]


def sum_with_interval(estimates: Sequence[Mapping[str, float]], value: str, stderr: str) -> str:
    """Return the sum of independent estimates with the half width of its 95% interval, as a cell."""
    errors, degrees = (np.array([x[name] for x in estimates]) for name in (stderr, "degrees_of_freedom"))
    width = interval_half_width(float(np.hypot.reduce(errors)), degrees_of_sum(errors, degrees))
    return f"{sum(x[value] for x in estimates):+.3f} ± {width:.3f}"


def predictors_table(regressed: Mapping[str, Any], title: str) -> str:
    """Return the table by predictor; ``title`` is the head of its first column."""
    lengths = [length for length in map(str, REGRESSED) if length in next(iter(regressed[OTHER].values()))]
    heads = [
        f"{'single steps' if length == '1' else f'sums of {length}'}, {kind}: {figure}"
        for length in lengths
        for kind in (SAME, OTHER)
        for figure in ("correlation", "R², best slope")
    ]
    lines = [f"| {title} | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name in regressed[OTHER]:
        figures = [regressed[kind][name][length] for length in lengths for kind in (SAME, OTHER)]
        cells = [cell for x in figures for cell in (format_interval(x["correlation"], "+.2f"), f"{x['r2']:.2f}")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def settings_of(model: Path, quick: bool) -> Settings:
    """Return the settings of the training run, or of a few steps of a tiny model."""
    if quick:
        return Settings(model, (0, 1), 1e-3, by_length, tasks("train"), tasks("eval"), 4, 6, 4)
    prepare_verifiers()
    held_out = held_out_tasks(2 * EVALUATED * STEPS)
    return Settings(model, LAYERS, LEARNING_RATE, verified, training_tasks(), held_out, STEPS, TOKENS, EVALUATED)


def main(argv: list[str] | None = None) -> int:
    command = parser(__doc__, "a tiny random model, written nowhere")
    command.add_argument("--collect", action="store_true", help="store the steps that an interrupted benchmark made")
    arguments = command.parse_args(argv)
    one_thread()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as name:
            settings = settings_of(tiny_model(Path(name) / "model"), quick=True)
            print(markdown(report_of(train(Path(name) / "run", settings), "a tiny model", settings)))
        return 0
    folder, settings = FOLDER / "prediction", settings_of(prepare_model(), quick=False)
    steps = stored_steps(folder) if arguments.collect else train(folder, settings)
    report = report_of(steps, MODEL, settings)
    store(NAME, report, {PAGE: {NAME: markdown(report)}})
    runs = [
        {"policy": MODEL, "lr": settings.lr, "prompts": kind, "found": measured_rows(steps, kind)} for kind in MEASURED
    ]
    plot({"runs": runs}, result_path(NAME).with_suffix(".svg"))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
