"""Are the step's own rollouts as good an E as fresh ones? Errors and seconds of both beside a large E.

    python -m benchmarks cross_fitting            writes results/cross_fitting.json and its table in README.md;
                                                  ten minutes on two cores, resumed where it stopped
    python -m benchmarks cross_fitting --quick    one small state, written nowhere, to check that it works

Before steps of GRPO training runs the influences of U's rollouts, and their sums over the field's four regions of
tokens, are computed three times: cross-fitted on U, on a fresh E of U's shape, and on U with nothing left out (the
plug-in). Each is compared with the influences on 8,192 rollouts of other prompts. Seconds are processor time of the
influences without labels of tokens, and for the fresh E of its sampling too.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import Any, NamedTuple

from scipy.stats import spearmanr

import fx_influence as fx
from benchmarks.evidence.arithmetic import draw_prompts
from benchmarks.evidence.bench_estimators import WithErrorBars, noise_share
from benchmarks.evidence.estimator_tables import format_factor, geometric
from benchmarks.evidence.training_runs import Benchmark, Policy, StepState, initial_policy, selected_step_states
from benchmarks.harness import format_interval, mean_interval
from fx_influence.types import Batch

NAME = "bench_cross_fitting"
SEEDS, MAX_NORM = 5, 1.0
DEGREES = 6
"""Degrees of freedom of 95% intervals, for every kind of E: seven of eight folds count, and all eight of a fresh E."""


class TrainingRun(NamedTuple):
    """A GRPO run that is measured before each of its ``steps``; U is ``prompts`` times ``each`` rollouts."""

    policy: str
    seed: int
    lr: float = 1e-4
    steps: tuple[int, ...] = (5, 20)
    prompts: int = 16
    each: int = 8
    true_prompts: int = 4096

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.seed}"


def train(training: TrainingRun) -> list[dict[str, Any]]:
    """Return the errors and seconds of every kind of E at each of the ``steps``."""
    policy = initial_policy(training.policy)
    states = selected_step_states(policy, training.lr, training.seed, training.steps, training.prompts, training.each)
    return [{"step": step_state.step, **measure(training, policy, step_state)} for step_state in states]


def measure(training: TrainingRun, policy: Policy, step_state: StepState) -> dict[str, Any]:
    """Return the errors of the influences by kind of E, and what they took, in processor seconds."""
    apply, params = fx.make_functional(policy.model)
    state = fx.adamw_state(step_state.optimizer, policy.model)
    u, seed = step_state.batch, step_state.rng.randrange(2**30)
    asked = training.prompts + training.true_prompts
    prompts = draw_prompts(random.Random(seed), asked, {p.text for p in policy.train}, "", policy.task)
    fresh_policy, true_policy = (
        policy._replace(held_out=part) for part in (prompts[: training.prompts], prompts[training.prompts :])
    )
    regions = fx.labels.regions(u, fx.token_values(params, u, apply))

    def influences(e: Batch | None, **options: Any) -> fx.Influence:
        return fx.influence(params, u, e, state, apply=apply, max_grad_norm=MAX_NORM, **options)

    def fresh_batch() -> Batch:
        return fresh_policy.evaluation(training.prompts, training.each, seed)

    truth = influences(true_policy.evaluation(training.true_prompts, 2, seed + 1), labels=regions)
    kinds: dict[str, Callable[[], Batch | None]] = {
        "cross-fitted": lambda: None,
        "fresh E": fresh_batch,
        "plug-in": lambda: u._replace(coefficients=None),
    }
    errors = {name: compare(influences(e(), labels=regions), truth, regions) for name, e in kinds.items()}
    seconds = {name: seconds_of(influences, kinds[name]) for name in ("cross-fitted", "fresh E")}
    return {"errors": errors, "seconds": seconds, "truth_noise_share": noise_share(truth)}


def compare(out: fx.Influence, truth: fx.Influence, regions: fx.labels.Labels) -> dict[str, float]:
    """Return errors of rollouts, and how often the sign of a region's sum is told and right."""
    error = out.per_sequence - truth.per_sequence
    sums, true_sums = out.sums(regions), truth.sums(regions)
    told = (sums.influence.abs() > fx.interval_half_width(sums.stderr, DEGREES)) & (sums.count > 0)
    return {
        "squared_error": float((error**2).sum() / (truth.per_sequence**2).sum()),
        "spearman": float(spearmanr(out.per_sequence.numpy(), truth.per_sequence.numpy()).statistic),
        "noise_share": noise_share(out),
        "covered": covered(out, truth),
        "told": float(told[:4].double().mean()),
        "right": float((told & (sums.influence.sign() == true_sums.influence.sign()))[:4].double().mean()),
    }


def covered(out: WithErrorBars, truth: WithErrorBars) -> float:
    """Return the share of rollouts with an influence whose true one is in its 95% interval, both with their noise."""
    error, noise = out.per_sequence - truth.per_sequence, (out.stderr**2 + truth.stderr**2).sqrt()
    moves = truth.per_sequence != 0
    return float((error.abs() <= fx.interval_half_width(noise, DEGREES))[moves].double().mean())


def seconds_of(influences: Callable[[Batch | None], Any], e: Callable[[], Batch | None]) -> float:
    """Return the processor seconds of making an E and of the influences over it."""
    start = time.process_time()
    influences(e())
    return time.process_time() - start


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return means over seeds by policy and kind of E, geometric ones of squared errors; a seed counts once."""
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in runs:
        for kind in run["found"][0]["errors"] if run["found"] else ():
            means = {name: fmean(state["errors"][kind][name] for state in run["found"]) for name in COLUMNS}
            means["squared_error"] = geometric_mean(state["errors"][kind]["squared_error"] for state in run["found"])
            if kind in run["found"][0]["seconds"]:
                ratios = [state["seconds"][kind] / state["seconds"]["fresh E"] for state in run["found"]]
                means["seconds"] = fmean(ratios)
            groups.setdefault((run["policy"], kind), []).append(means)
    return [
        {"policy": policy, "kind": kind}
        | {name: mean_interval([x[name] for x in seeds]) for name in seeds[0]}
        | {"squared_error": geometric([x["squared_error"] for x in seeds])}
        for (policy, kind), seeds in groups.items()
    ]


COLUMNS = {
    "squared_error": "squared error",
    "spearman": "rank correlation",
    "noise_share": "noise by error bars",
    "covered": "true influence in its 95% interval",
    "told": "signs of regions told",
    "right": "signs of regions told and right",
}
"""Heads of the table by figure; all but the first two are shares."""


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table by kind of E."""
    lines = [
        f"| policy, E | {' | '.join(COLUMNS.values())} | processor seconds, over those with a fresh E |",
        "|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for row in report["summary"]:
        cells = [format_factor(row["squared_error"]), format_interval(row["spearman"], ".2f")]
        cells += [f"{format_interval(row[name], '.0f', 100)}%" for name in list(COLUMNS)[2:]]
        cells.append(format_interval(row["seconds"], ".2f") if "seconds" in row else "")
        lines.append(f"| {row['policy']}, {row['kind']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def training_runs(quick: bool) -> list[TrainingRun]:
    """Return the training runs of the benchmark."""
    if quick:
        return [TrainingRun("demo", seed, steps=(1,), prompts=4, each=4, true_prompts=16) for seed in (0, 1)]
    return [TrainingRun(policy, seed) for policy in ("demo", "early") for seed in range(SEEDS)]


BENCHMARK = Benchmark(NAME, __doc__, training_runs, train, summary, markdown)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
