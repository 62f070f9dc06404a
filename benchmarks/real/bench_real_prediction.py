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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.bench_prediction import OTHER, SAME, evaluate, plot
from benchmarks.harness import EVIDENCE, format_interval, one_thread, parser, result_path, store
from benchmarks.real.language_model import FOLDER, prepare_model, prepare_verifiers, tiny_model
from benchmarks.real.predicted_run import E_ITSELF, MEASURED, Settings, drawn_tasks, stored_steps, train, training_tasks
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
BLOCKS = 10
"""Largest number of blocks of consecutive steps that an interval's jackknife leaves out in turn."""
MOMENTUM = 0.9
"""AdamW's first beta."""
TERMS = ("total", "total_stderr", "momentum", "weight_decay", "rollouts")
INFLUENCES = {
    "total": "influences",
    "rollouts": "of them the step's rollouts",
    "momentum": "of them momentum",
    "without_score": "influences without the score term",
}


def measured_rows(steps: Sequence[Mapping[str, Any]], measured: str) -> list[dict[str, Any]]:
    """Return the prediction of each step beside its change on one kind of rollouts, as ``evaluate`` reads them.

    ``stderrs`` and ``degrees`` are those of both.
    """
    rows = []
    for step in steps:
        predicted, change = step["predicted"], step["measured"][measured]
        row = {name: predicted[name] for name in (*TERMS, *(["eta_trust"] if "eta_trust" in predicted else []))}
        row |= {"step": step["step"], "realised": change["delta_h"], "realised_stderr": change["stderr"]}
        row["stderrs"] = [predicted["total_stderr"], change["stderr"]]
        row["degrees"] = [predicted["degrees_of_freedom"], change["degrees_of_freedom"]]
        rows.append(row)
    return rows


def measurement_rows(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return ``measured_rows`` in which the change on fresh rollouts of E's prompts predicts that on other prompts."""
    rows = measured_rows(steps, OTHER)
    for row, step in zip(rows, steps, strict=True):
        same = step["measured"][SAME]
        row |= {"total": same["delta_h"], "total_stderr": same["stderr"]}
        row["stderrs"], row["degrees"] = (
            [same[name], step["measured"][OTHER][name]] for name in ("stderr", "degrees_of_freedom")
        )
    return rows


def averaged_rows(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return ``measured_rows`` on other prompts, predicted by the mean of the prediction and the change on E's prompts.

    That change is to first order what fresh rollouts of E's prompts predict, so it is a prediction from two of each.
    """
    rows = measured_rows(steps, OTHER)
    for row, step in zip(rows, steps, strict=True):
        row["total"] = (row["total"] + step["measured"][SAME]["delta_h"]) / 2
    return rows


def in_windows(rows: Sequence[Mapping[str, Any]], length: int) -> list[dict[str, Any]]:
    """Return the sums of ``measured_rows`` over consecutive windows of ``length`` steps; a shorter rest is left out."""
    windows = [rows[k : k + length] for k in range(0, len(rows) - length + 1, length)]
    return [
        {
            **{name: sum(row[name] for row in window) for name in (*TERMS, "realised")},
            **{name: float(np.hypot.reduce([x[name] for x in window])) for name in ("total_stderr", "realised_stderr")},
            **{name: [x for row in window for x in row[name]] for name in ("stderrs", "degrees")},
        }
        for window in windows
    ]


def coverage(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of errors within the 95% interval of both error bars, by Student's t."""
    errors = np.array([row["realised"] - row["total"] for row in rows])
    widths = [
        interval_half_width(
            float(np.hypot.reduce(row["stderrs"])), degrees_of_sum(np.array(row["stderrs"]), np.array(row["degrees"]))
        )
        for row in rows
    ]
    return float((np.abs(errors) <= widths).mean())


def figures_of(rows: Sequence[Mapping[str, Any]], lr: float) -> dict[str, Any]:
    """Return how good the predictions of rows are, with intervals of R² and the correlation.

    ``expected`` is the R² of a prediction whose errors are as large as both error bars say, and no larger.
    """
    figures = evaluate([dict(row) for row in rows], lr)
    variance = np.var([row["realised"] for row in rows])
    errors = np.mean([np.square(row["stderrs"]).sum() for row in rows])

    def without_block(name: str, chosen: Sequence[int]) -> float:
        return evaluate([dict(rows[k]) for k in chosen], lr)[name]

    return {
        **figures,
        **{name: jackknife(len(rows), partial(without_block, name)) for name in ("r2", "correlation")},
        "count": len(rows),
        "expected": float(1 - errors / variance),
        "covered": coverage(rows),
    }


def jackknife(count: int, figure: Callable[[Sequence[int]], float]) -> dict[str, float]:
    """Return a figure of rows with the half width of its 95% interval, by leaving out blocks of consecutive rows.

    Args:
        count: number of rows.
        figure: function of the indices of rows.

    Source: Künsch, The Jackknife and the Bootstrap for General Stationary Observations, 1989.
    """
    blocks = np.array_split(np.arange(count), min(BLOCKS, count))
    left = [figure([k for k in range(count) if k not in block]) for block in map(set, blocks)]
    stderr = float(np.sqrt((len(left) - 1) * np.var(left)))
    return {"mean": figure(range(count)), "half_width": interval_half_width(stderr, len(left) - 1)}


def averaged(values: np.ndarray) -> np.ndarray:
    """Return the averages over past steps (K,) that AdamW makes of gradients, with its correction of the first."""
    mean, averages = 0.0, []
    for value in values:
        mean = MOMENTUM * mean + (1 - MOMENTUM) * value
        averages.append(mean)
    return np.array(averages) / (1 - MOMENTUM ** np.arange(1, len(averages) + 1))


def predictors(steps: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return every step's prediction (K,) by name: influences, their terms, proxies, and these averaged over steps."""
    values = {label: np.array([s["predicted"][name] for s in steps]) for name, label in INFLUENCES.items()}
    proxies = {name: np.array([s["proxies"][name] for s in steps]) for name in steps[0]["proxies"]}
    return values | proxies | {f"{name}, averaged": averaged(x) for name, x in proxies.items()}


def regression(predicted: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """Return the correlation with its interval, and R² with the slope through 0 that suits these values best."""
    slope = predicted @ measured / (predicted @ predicted)
    residual = ((measured - slope * predicted) ** 2).mean()
    return {
        "correlation": jackknife(
            len(measured), lambda rows: float(np.corrcoef(predicted[list(rows)], measured[list(rows)])[0, 1])
        ),
        "r2": float(1 - residual / measured.var()),
        "slope": float(slope),
    }


def summed(values: np.ndarray, length: int) -> np.ndarray:
    """Return the sums of values (K,) over consecutive windows; a shorter rest is left out."""
    return values[: len(values) // length * length].reshape(-1, length).sum(1)


def report_of(steps: Sequence[Mapping[str, Any]], policy: str, settings: Settings) -> dict[str, Any]:
    """Return the report of the steps made so far."""
    lengths = [length for length in WINDOWS if len(steps) // length > 2]
    every = {kind: measured_rows(steps, kind) for kind in MEASURED}
    every |= {BY_MEASUREMENT: measurement_rows(steps), BY_BOTH: averaged_rows(steps)}
    regressed = {
        measured: {
            name: {
                str(length): regression(summed(x, length), summed(changes_on(steps, measured), length))
                for length in lengths
                if length in REGRESSED
            }
            for name, x in predictors(steps).items()
        }
        for measured in (SAME, OTHER)
    }
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
        "regressed": regressed,
        "trusted_lrs": evaluate(measured_rows(steps, OTHER), settings.lr)["trusted_lrs"],
        "steps": list(steps),
    }


BY_MEASUREMENT, BY_BOTH = "other, by same", "other, by both"
REGRESSED = (1, 10)
"""Lengths of the windows in which predictors are compared."""


def changes_on(steps: Sequence[Mapping[str, Any]], measured: str) -> np.ndarray:
    """Return the measured change of every step (K,) on one kind of rollouts."""
    return np.array([step["measured"][measured]["delta_h"] for step in steps])


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
    return "\n\n".join([predictions_table(report), sums_table(report), predictors_table(report["regressed"])])


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


def predictors_table(regressed: Mapping[str, Any]) -> str:
    """Return the table by predictor."""
    lengths = [length for length in map(str, REGRESSED) if length in next(iter(regressed[OTHER].values()))]
    heads = [
        f"{'single steps' if length == '1' else f'sums of {length}'}, {kind}: {figure}"
        for length in lengths
        for kind in (SAME, OTHER)
        for figure in ("correlation", "R², best slope")
    ]
    lines = [f"| predictor | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
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
    held_out = drawn_tasks(2 * EVALUATED * STEPS)
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
