"""Is the entropy's change in each step of a training what was foretold before it? Over whole runs, and what made it.

    python -m benchmarks prediction            writes results/prediction.json and the README's table; half an hour on
                                               two cores, continued where it stopped
    python -m benchmarks prediction --quick    a few steps, written nowhere: it only shows that this works

Before each step the influences on E foretell its change of entropy, lr times total, with an error bar, and the share of
momentum, weight decay and the step's own rollouts in it. The step is made, and the change measured by importance
sampling on other rollouts of the policy before it. R² is of the foretold change as it is, no line fitted.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import fx_influence as fx
from benchmarks.arithmetic import fresh_optimizer, reinforce, update_batch
from benchmarks.harness import interval, one_thread, store
from benchmarks.trainings import Policy, carried_out, started
from fx_influence.derivatives import batch_gradient
from fx_influence.interop.environment import environment
from fx_influence.interop.rollouts import collate
from fx_influence.types import Batch, Params

NAME = "bench_prediction"
PROMPTS, COMPLETIONS, SEEDS, MAX_NORM = 8, 8, 5, 1.0
CURVED = 10
"""The second derivative is measured at every tenth step."""


class Training(NamedTuple):
    """One GRPO run, foretold step by step."""

    policy: str
    lr: float
    seed: int
    steps: int = 100
    evaluated: int = 64

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.lr:g}-{self.seed}"


def train(training: Training) -> list[dict[str, float]]:
    """Of every step what was foretold and what happened, in nats."""
    policy, rng = started(training.policy), random.Random(training.seed)
    optimizer = fresh_optimizer(policy.model, training.lr)
    apply, live = fx.functionalize(policy.model)
    found = []
    for step in range(1, training.steps + 1):
        seed = training.seed * 100_003 + step
        rollouts = policy.drawn(rng.sample(policy.train, PROMPTS), COMPLETIONS, seed)
        batch = update_batch(rollouts, policy.tokenizer.pad_token_id, policy.task.max_new_tokens)
        e, other = (_held_out(policy, training.evaluated, each, seed + k * 10**9) for k, each in ((1, 2), (2, 4)))
        params = {name: p.clone() for name, p in live.items()}
        foretold = _foretold(training, params, batch, e, fx.adamw_state(optimizer, policy.model), apply, step)
        reinforce(policy.model, optimizer, batch)
        moved = {name: live[name] - p for name, p in params.items()}
        real = fx.snis_delta(params, moved, 1.0, other, apply=apply)
        happened = {"realised": float(real.delta_h), "realised_stderr": float(real.stderr), "ess": float(real.ess)}
        found.append({"step": step, **foretold, **happened})
    return found


def _held_out(policy: Policy, count: int, each: int, seed: int) -> Batch:
    return collate(policy.drawn(policy.held_out[:count], each, seed), policy.tokenizer.pad_token_id)


def _foretold(
    training: Training, params: Params, u: Batch, e: Batch, state: fx.AdamWState, apply: fx.Policy, step: int
) -> dict[str, float]:
    out = fx.influence(params, u, e, state, apply=apply, max_grad_norm=MAX_NORM, per_token=False)
    parts = {name: getattr(out, name) for name in ("total", "momentum", "weight_decay", "total_stderr")}
    foretold = {name: training.lr * float(x) for name, x in parts.items()}
    foretold["rollouts"] = training.lr * float(out.per_sequence.sum())
    if step % CURVED == 0:
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
    """Means over seeds with 95% intervals, by policy and learning rate, of all steps and of those after the 20th."""
    groups: dict[tuple[str, float, str], list[dict[str, float]]] = {}
    for run in runs:
        for name, steps in (("all", run["steps_found"]), ("after 20", run["steps_found"][20:])):
            if len(steps) > 2:
                groups.setdefault((run["policy"], run["lr"], name), []).append(judged(steps, run["lr"]))
    return [
        {
            "policy": policy,
            "lr": lr,
            "steps": steps,
            **{name: interval([one[name] for one in found if name in one]) for name in found[0]},
        }
        for (policy, lr, steps), found in groups.items()
    ]


COLUMNS = {
    "r2": "R²",
    "explainable": "of it to be had",
    "within_two": "within 2 stderr",
    "realised_sum": "ΔH, realised",
    "foretold_sum": "foretold",
    "momentum_sum": "by momentum",
    "rollouts_sum": "by the steps' rollouts",
    "trusted_lrs": "η_trust / lr",
}


def markdown(report: dict[str, Any]) -> str:
    """The README's table."""
    lines = [f"| policy, lr, steps | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS)]
    for row in report["summary"]:
        cells = [_cell(row.get(name)) for name in COLUMNS]
        lines.append(f"| {row['policy']}, {row['lr']:g}, {row['steps']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['mean']:.3g} ± {found['half_width']:.1g}"


def trainings(quick: bool) -> list[Training]:
    """All that is run."""
    if quick:
        return [Training("demo", 1e-4, seed, steps=3, evaluated=4) for seed in (0, 1)]
    demo = [Training("demo", lr, seed) for lr in (1e-5, 1e-4, 1e-3) for seed in range(SEEDS)]
    return [*demo, *(Training("large", 1e-4, seed) for seed in range(SEEDS))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps, written nowhere")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    arguments = parser.parse_args(argv)
    one_thread()
    todo = trainings(arguments.quick)
    if arguments.quick:
        found = [train(t) for t in todo]
    else:
        for policy in dict.fromkeys(t.policy for t in todo):
            started(policy)
        found = carried_out(NAME, train, todo, arguments.jobs)
    runs = [{**t._asdict(), "steps_found": steps} for t, steps in zip(todo, found, strict=True)]
    report = {"environment": environment(), "summary": summary(runs), "runs": runs}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
