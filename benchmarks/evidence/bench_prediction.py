"""Is the entropy's change in each step of a training what was foretold before it? Over whole runs, and what made it.

    python -m benchmarks prediction            writes results/prediction.json and EVIDENCE.md;
                                               half an hour on two cores, continued where it stopped
    python -m benchmarks prediction --quick    a few steps, written nowhere: it only shows that this works

Before each step the influences on E foretell its change of entropy, lr times total, with an error bar, and the share of
momentum, weight decay and the step's own rollouts in it. The step is made, and the change measured by importance
sampling on other rollouts of the policy before it: of the prompts of E or, in trainings apart, of other ones. R² is of
the foretold change as it is, no line fitted; what there is of it to be had is what the measurement's own error leaves.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fx_influence as fx
from benchmarks.evidence.arithmetic import reinforce
from benchmarks.evidence.trainings import Benchmark, moments, started
from benchmarks.harness import drawn, interval, shown
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.interop.rollouts.batch import collate
from fx_influence.types import Batch, Params

NAME = "bench_prediction"
PROMPTS, COMPLETIONS, SEEDS, MAX_NORM = 8, 8, 5, 1.0
SAME, OTHER = "same", "other"
"""Prompts that a change is measured on, beside those of E: error bars count the draw of prompts."""
CURVED = 10
"""The second derivative is measured at every tenth step."""


class Training(NamedTuple):
    """One GRPO run, foretold step by step, and measured on fresh rollouts of the same or of other prompts."""

    policy: str
    lr: float
    prompts: str
    seed: int
    steps: int = 100
    evaluated: int = 64

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.lr:g}-{self.prompts}-{self.seed}"


def train(training: Training) -> list[dict[str, float]]:
    """Of every step what was foretold and what happened, in nats."""
    policy = started(training.policy)
    apply, live = fx.make_functional(policy.model)
    found = []
    for now in moments(policy, training.lr, training.seed, training.steps, PROMPTS, COMPLETIONS):
        seed = now.rng.randrange(2**30)
        own, others = (policy.held_out[k * training.evaluated :][: training.evaluated] for k in (0, 1))
        e, other = (
            collate(policy.drawn(prompts, each, seed + each), policy.tokenizer.pad_token_id)
            for prompts, each in ((own, 2), (own if training.prompts == SAME else others, 4))
        )
        params = {name: p.clone() for name, p in live.items()}
        state = fx.adamw_state(now.optimizer, policy.model)
        foretold = _foretold(training, params, now.batch, e, state, apply, curved=now.step % CURVED == 0)
        reinforce(policy.model, now.optimizer, now.batch)
        moved = {name: live[name] - p for name, p in params.items()}
        real = fx.snis_delta(params, moved, 1.0, other, apply=apply)
        happened = {"realised": float(real.delta_h), "realised_stderr": float(real.stderr), "ess": float(real.ess)}
        found.append({"step": now.step, **foretold, **happened})
    return found


def _foretold(
    training: Training, params: Params, u: Batch, e: Batch, state: fx.AdamWState, apply: fx.Policy, curved: bool
) -> dict[str, float]:
    out = fx.influence(params, u, e, state, apply=apply, max_grad_norm=MAX_NORM, per_token=False)
    parts = {name: getattr(out, name) for name in ("total", "momentum", "weight_decay", "total_stderr")}
    foretold = {name: training.lr * float(x) for name, x in parts.items()}
    foretold["rollouts"] = training.lr * float(out.per_sequence.sum())
    if curved:
        v = fx.adamw_decompose(batch_gradient(params, u, apply), state, params, max_grad_norm=MAX_NORM).direction
        slope = fx.jvp_delta(params, v, e, apply=apply)
        foretold["eta_trust"] = float((0.2 * slope.first / slope.second).abs())
    return foretold


def judged(steps: Sequence[dict[str, float]], lr: float) -> dict[str, float]:
    """Of one run: R² of what was foretold, how wide its errors are beside the bars, and what the sum is made of."""
    foretold, real, error, real_error = (
        np.array([s[name] for s in steps]) for name in ("total", "realised", "total_stderr", "realised_stderr")
    )
    off = (real - foretold) / np.sqrt(error**2 + real_error**2)
    # What the measurement itself leaves to be explained.
    explainable = 1 - (real_error**2).mean() / real.var()
    trust = [s["eta_trust"] / lr for s in steps if "eta_trust" in s]
    return {
        "r2": float(1 - ((real - foretold) ** 2).mean() / real.var()),
        "explainable": float(explainable),
        "correlation": float(np.corrcoef(real, foretold)[0, 1]),
        "spread": float(np.sqrt((off**2).mean())),
        "within_two": float((np.abs(off) < 2).mean()),
        "realised_sum": float(real.sum()),
        "foretold_sum": float(foretold.sum()),
        **{f"{part}_sum": float(sum(s[part] for s in steps)) for part in ("momentum", "weight_decay", "rollouts")},
        **({"trusted_lrs": float(np.median(trust))} if trust else {}),
    }


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds with 95% intervals, by learning rate and prompts, of all steps and of those after the 20th."""
    groups: dict[tuple[str, float, str, str], list[dict[str, float]]] = {}
    for run in runs:
        for name, steps in (("all", run["found"]), ("after 20", run["found"][20:])):
            if len(steps) > 2:
                key = run["policy"], run["lr"], run["prompts"], name
                groups.setdefault(key, []).append(judged(steps, run["lr"]))
    return [
        {
            "policy": policy,
            "lr": lr,
            "prompts": prompts,
            "steps": steps,
            **{name: interval([one[name] for one in found if name in one]) for name in found[0]},
        }
        for (policy, lr, prompts, steps), found in groups.items()
    ]


COLUMNS = {
    "r2": "R²",
    "explainable": "of it to be had",
    "spread": "errors / error bars",
    "within_two": "within 2 stderr",
    "realised_sum": "ΔH, realised",
    "foretold_sum": "foretold",
    "momentum_sum": "by momentum",
    "rollouts_sum": "by the steps' rollouts",
    "trusted_lrs": "η_trust / lr",
}


def markdown(report: dict[str, Any]) -> str:
    """By learning rate, and prompts that the change is measured on: how well it is foretold, and what it is made of."""
    lines = [f"| policy, lr, prompts, steps | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS)]
    for row in report["summary"]:
        cells = [shown(row.get(name), ".2g") for name in COLUMNS]
        lines.append(f"| {row['policy']}, {row['lr']:g}, {row['prompts']}, {row['steps']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Every step's change of entropy, foretold and realised, and their sums beside what made them."""
    groups: dict[str, list[list[dict[str, float]]]] = {}
    for run in report["runs"]:
        groups.setdefault(f"lr {run['lr']:g}, {run['prompts']} prompts", []).append(run["found"])
    with drawn(path, 2, len(groups), (10, 5)) as axes:
        for column, (title, found) in enumerate(groups.items()):
            steps, sums = axes[:, column]
            total, real = (np.array([[s[name] for s in one] for one in found]) for name in ("total", "realised"))
            steps.plot(real.ravel(), total.ravel(), "o", ms=1.5, color="#0072B2", alpha=0.4, rasterized=True)
            ends = [real.min(), real.max()]
            steps.plot(ends, ends, color="black", lw=0.8)
            steps.set(title=title, xlabel="ΔH realised in a step, nats")
            for name, (label, color) in PARTS.items():
                of_runs = np.array([[s[name] for s in one] for one in found]).cumsum(1)
                mean, width = of_runs.mean(0), of_runs.std(0, ddof=1) / np.sqrt(len(of_runs))
                at = np.arange(1, len(mean) + 1)
                sums.plot(at, mean, color=color, lw=1.2, label=label)
                sums.fill_between(at, mean - width, mean + width, color=color, alpha=0.2, lw=0)
            sums.set(xlabel="optimizer step")
        axes[0][0].set(ylabel="ΔH foretold, nats")
        axes[1][0].set(ylabel="sum of ΔH so far, nats")
        axes[1][0].legend(frameon=False, fontsize=8)


PARTS = {
    "realised": ("realised", "#D55E00"),
    "total": ("foretold", "#0072B2"),
    "momentum": ("of it momentum", "#009E73"),
    "rollouts": ("of it rollouts", "#CC79A7"),
}


def trainings(quick: bool) -> list[Training]:
    """All that is run."""
    if quick:
        return [Training("demo", 1e-4, SAME, seed, steps=3, evaluated=4) for seed in (0, 1)]
    return [
        Training("demo", lr, prompts, seed) for prompts in (SAME, OTHER) for lr in (1e-5, 1e-4) for seed in range(SEEDS)
    ]


BENCHMARK = Benchmark(NAME, __doc__, trainings, train, summary, markdown, plot=plot)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
