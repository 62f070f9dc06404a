"""Is the change of entropy in each step of a training run as predicted before it? Sums over runs, and their causes.

    python -m benchmarks prediction            writes results/prediction.json and its table in README.md;
                                               half an hour on two cores, resumed where it stopped
    python -m benchmarks prediction --quick    a few steps, written nowhere, to check that it works

Before each step the influences on E predict its change of entropy, lr times total, with an error bar, and the share of
momentum, weight decay and the step's rollouts in it. The step is made, and the change measured by importance sampling
on other rollouts of the policy before it: of the prompts of E or, in separate training runs, of other prompts. R² is of
the prediction itself, with no line fitted; the explainable R² is what the error of the measurement leaves.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fx_influence as fx
from benchmarks.evidence.arithmetic import reinforce
from benchmarks.evidence.training_runs import Benchmark, initial_policy, step_states
from benchmarks.harness import format_interval, mean_interval, svg_figure
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.interop.rollouts.batch import collate
from fx_influence.types import Batch, Params

NAME = "bench_prediction"
PROMPTS, COMPLETIONS, SEEDS, MAX_NORM = 8, 8, 5, 1.0
SAME, OTHER = "same", "other"
"""Prompts that a change is measured on, those of E or others: error bars account for the draw of prompts."""
SECOND_ORDER_EVERY = 10
"""Steps between measurements of the second derivative."""


class TrainingRun(NamedTuple):
    """A GRPO run, predicted step by step, and measured on fresh rollouts of the same or of other prompts."""

    policy: str
    lr: float
    prompts: str
    seed: int
    steps: int = 100
    evaluated: int = 64

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.lr:g}-{self.prompts}-{self.seed}"


def train(training: TrainingRun) -> list[dict[str, float]]:
    """Return the predicted and the measured change of every step, in nats."""
    policy = initial_policy(training.policy)
    apply, live = fx.make_functional(policy.model)
    steps = []
    for step_state in step_states(policy, training.lr, training.seed, training.steps, PROMPTS, COMPLETIONS):
        seed = step_state.rng.randrange(2**30)
        e_prompts, other_prompts = (policy.held_out[k * training.evaluated :][: training.evaluated] for k in (0, 1))
        e, other = (
            collate(policy.sample(prompts, each, seed + each), policy.tokenizer.pad_token_id)
            for prompts, each in ((e_prompts, 2), (e_prompts if training.prompts == SAME else other_prompts, 4))
        )
        params = {name: p.clone() for name, p in live.items()}
        state = fx.adamw_state(step_state.optimizer, policy.model)
        predicted = _predict(
            training, params, step_state.batch, e, state, apply, second_order=step_state.step % SECOND_ORDER_EVERY == 0
        )
        reinforce(policy.model, step_state.optimizer, step_state.batch)
        step = {name: live[name] - p for name, p in params.items()}
        measured = fx.snis_delta(params, step, 1.0, other, apply=apply)
        figures = {"realised": measured.delta_h, "realised_stderr": measured.stderr, "ess": measured.ess}
        steps.append({"step": step_state.step, **predicted, **{name: float(x) for name, x in figures.items()}})
    return steps


def _predict(
    training: TrainingRun,
    params: Params,
    u: Batch,
    e: Batch,
    state: fx.AdamWState,
    apply: fx.Policy,
    second_order: bool,
) -> dict[str, float]:
    out = fx.influence(params, u, e, state, apply=apply, max_grad_norm=MAX_NORM, per_token=False)
    terms = {name: getattr(out, name) for name in ("total", "momentum", "weight_decay", "total_stderr")}
    predicted = {name: training.lr * float(x) for name, x in terms.items()}
    predicted["rollouts"] = training.lr * float(out.per_sequence.sum())
    if second_order:
        v = fx.adamw_decompose(batch_gradient(params, u, apply), state, params, max_grad_norm=MAX_NORM).direction
        derivatives = fx.jvp_delta(params, v, e, apply=apply)
        predicted["eta_trust"] = float((0.2 * derivatives.first / derivatives.second).abs())
    return predicted


def evaluate(steps: Sequence[dict[str, float]], lr: float) -> dict[str, float]:
    """Return R² of the predictions of one run, the ratio of errors to error bars, and the terms of the sum."""
    predicted, measured, error, measured_error = (
        np.array([s[name] for s in steps]) for name in ("total", "realised", "total_stderr", "realised_stderr")
    )
    errors = (measured - predicted) / np.sqrt(error**2 + measured_error**2)
    # The error of the measurement cannot be explained.
    explainable = 1 - (measured_error**2).mean() / measured.var()
    trust = [s["eta_trust"] / lr for s in steps if "eta_trust" in s]
    return {
        "r2": float(1 - ((measured - predicted) ** 2).mean() / measured.var()),
        "explainable": float(explainable),
        "correlation": float(np.corrcoef(measured, predicted)[0, 1]),
        "spread": float(np.sqrt((errors**2).mean())),
        "within_two": float((np.abs(errors) < 2).mean()),
        "realised_sum": float(measured.sum()),
        "foretold_sum": float(predicted.sum()),
        **{f"{term}_sum": float(sum(s[term] for s in steps)) for term in ("momentum", "weight_decay", "rollouts")},
        **({"trusted_lrs": float(np.median(trust))} if trust else {}),
    }


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means over seeds with 95% intervals by learning rate and prompts, of all steps and after the 20th."""
    groups: dict[tuple[str, float, str, str], list[dict[str, float]]] = {}
    for run in runs:
        for name, steps in (("all", run["found"]), ("after 20", run["found"][20:])):
            if len(steps) > 2:
                key = run["policy"], run["lr"], run["prompts"], name
                groups.setdefault(key, []).append(evaluate(steps, run["lr"]))
    return [
        {
            "policy": policy,
            "lr": lr,
            "prompts": prompts,
            "steps": steps,
            **{name: mean_interval([run[name] for run in runs_figures if name in run]) for name in runs_figures[0]},
        }
        for (policy, lr, prompts, steps), runs_figures in groups.items()
    ]


COLUMNS = {
    "r2": "R²",
    "explainable": "explainable R²",
    "spread": "errors / error bars",
    "within_two": "within 2 stderr",
    "realised_sum": "ΔH, measured",
    "foretold_sum": "predicted",
    "momentum_sum": "by momentum",
    "rollouts_sum": "by the steps' rollouts",
    "trusted_lrs": "η_trust / lr",
}


def markdown(report: dict[str, Any]) -> str:
    """Return the table by learning rate and prompts: how good the predictions are, and the terms of the sum."""
    lines = [f"| policy, lr, prompts, steps | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS)]
    for row in report["summary"]:
        cells = [format_interval(row.get(name), ".2g") for name in COLUMNS]
        lines.append(f"| {row['policy']}, {row['lr']:g}, {row['prompts']}, {row['steps']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw every step's change of entropy, predicted and measured, and their sums with their terms."""
    groups: dict[str, list[list[dict[str, float]]]] = {}
    for run in report["runs"]:
        prompts = f"{run['prompts']} prompts" if run["prompts"] in (SAME, OTHER) else run["prompts"]
        groups.setdefault(f"lr {run['lr']:g}, {prompts}", []).append(run["found"])
    with svg_figure(path, 2, len(groups), (10, 5)) as axes:
        for column, (title, runs) in enumerate(groups.items()):
            steps, sums = axes[:, column]
            total, measured = (np.array([[s[name] for s in run] for run in runs]) for name in ("total", "realised"))
            steps.plot(measured.ravel(), total.ravel(), "o", ms=1.5, color="#0072B2", alpha=0.4, rasterized=True)
            ends = [measured.min(), measured.max()]
            steps.plot(ends, ends, color="black", lw=0.8)
            steps.set(title=title, xlabel="ΔH measured in a step, nats")
            for name, (label, color) in TERMS.items():
                cumulative = np.array([[s[name] for s in run] for run in runs]).cumsum(1)
                mean, numbers = cumulative.mean(0), np.arange(1, cumulative.shape[1] + 1)
                sums.plot(numbers, mean, color=color, lw=1.2, label=label)
                if len(cumulative) > 1:
                    width = cumulative.std(0, ddof=1) / np.sqrt(len(cumulative))
                    sums.fill_between(numbers, mean - width, mean + width, color=color, alpha=0.2, lw=0)
            sums.set(xlabel="optimizer step")
        axes[0][0].set(ylabel="ΔH predicted, nats")
        axes[1][0].set(ylabel="sum of ΔH so far, nats")
        axes[1][0].legend(frameon=False, fontsize=8)


TERMS = {
    "realised": ("measured", "#D55E00"),
    "total": ("predicted", "#0072B2"),
    "momentum": ("of it momentum", "#009E73"),
    "rollouts": ("of it rollouts", "#CC79A7"),
}


def training_runs(quick: bool) -> list[TrainingRun]:
    """Return the training runs of the benchmark."""
    if quick:
        return [TrainingRun("demo", 1e-4, SAME, seed, steps=3, evaluated=4) for seed in (0, 1)]
    return [
        TrainingRun("demo", lr, prompts, seed)
        for prompts in (SAME, OTHER)
        for lr in (1e-5, 1e-4)
        for seed in range(SEEDS)
    ]


BENCHMARK = Benchmark(NAME, __doc__, training_runs, train, summary, markdown, plot=plot)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
