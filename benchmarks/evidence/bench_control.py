"""Does holding the entropy by weights of kinds of tokens pay? ``fx.control`` beside other methods, at equal rollouts.

    python -m benchmarks control            writes results/control.json and its table in README.md;
                                            forty minutes on two cores, resumed where it stopped
    python -m benchmarks control --quick    a few steps, written nowhere, to check that it works

The training runs of ``bench_acting``: the policy before its own GRPO steps ("early"), as many rollouts and optimizer
steps for every method from the same state, three settings for each; and its harder task, with the best of them. Beside
the methods there: an entropy bonus whose coefficient rises below the target and falls above it, as TRL's
``use_adaptive_entropy`` (Skywork-OR1, arXiv 2505.22312); STEER (arXiv 2510.10150), weights of tokens that fall with
their estimated effect on the entropy; REPO (arXiv 2603.11682), advantages less a share of log pi + h. Control measures
every ``MEASURED``-th batch on its own rollouts, cross-fitted, and its weights of the four regions multiply the
coefficients of the batches after it.

What counts as paying, stated before the first run. Control is entered with the setting of the highest pass@1 + pass@8.
On a policy either of

1. pass@8 is above plain GRPO's beyond the 95% interval of the paired difference over seeds, and pass@1 is not below
   plain GRPO's beyond its interval;
2. the target is held (the mean entropy at the end is within a twentieth of it), and each other method at each setting
   either misses the target by more than a twentieth or has a lower mean pass@1;

and in both cases a batch takes at most ``MAX_COST`` times plain GRPO's processor time. Otherwise it does not pay, and
the table says so.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fx_influence as fx
from benchmarks.evidence import bench_acting
from benchmarks.evidence.bench_acting import (
    MAX_NORM,
    Bonus,
    TrainingRun,
    Weigh,
    method_weights,
    train_weighted,
)
from benchmarks.evidence.training_runs import Benchmark, Policy, StepState
from fx_influence.types import TokenValues

NAME, SEEDS = "bench_control", 3
CONTROL = "control"
ADAPTIVE, STEER, REPO = "adaptive bonus", "steer", "repo"
SETTINGS: dict[str, tuple[float | None, ...]] = {
    "grpo": (None,),
    "bonus": (0.02, 0.1, 0.3),
    ADAPTIVE: (0.001, 0.005, 0.02),
    "clip higher": (0.28, 0.4, 0.6),
    "clip-cov": (0.005, 0.01, 0.02),
    "kl-cov": (1.0, 10.0, 50.0),
    STEER: (0.8, 0.5, 0.2),
    REPO: (0.02, 0.1, 0.3),
    CONTROL: (0.5, 0.8, 0.95),
}
"""Numbers of each method: see ``bench_acting.SETTINGS``; the adaptive coefficient's change at a step; the weight of the
token with the largest estimated effect; REPO's share; the confidence of control's weights."""

ON_HARDER: dict[str, float | None] = {
    "grpo": None,
    "bonus": 0.02,
    ADAPTIVE: 0.02,
    "clip higher": 0.6,
    "clip-cov": 0.02,
    "kl-cov": 10.0,
    STEER: 0.5,
    REPO: 0.02,
    CONTROL: 0.8,
}
"""The setting of each method on the policy "harder": that of the highest pass@1 + pass@8 on "early"; of control the one
of those that held the target there, since at 0.95 it hardly acted."""

TARGETS = {"early": 0.32, "harder": 0.35, "demo": 0.14, "SmolLM2-135M": 0.73, "tiny": 4.0}
"""Entropy to hold, nats per token: about nine tenths of the policy's at the beginning."""

MEASURED, FORGETTING, HORIZON, BOUNDS = 4, 0.8, 20, (0.05, 1.5)
MAX_COEFFICIENT, SMALLEST_EFFECT = 1.0, 0.02
"""TRL's bound of the adaptive coefficient, and STEER's floor of the largest estimated effect."""

NEAR, MAX_COST = 0.05, 1.6


def train(training: TrainingRun) -> list[dict[str, Any]]:
    """Return entropy, accuracy and elapsed seconds at the beginning and after every ``every`` steps."""
    return train_weighted(training, *weigh_and_bonus(training))


def weigh_and_bonus(training: TrainingRun) -> tuple[Weigh, Bonus | None]:
    """Return the weights of tokens of a method and, where it sets one, the entropy's coefficient."""
    weigh = {CONTROL: controller(), STEER: steer_weights}.get(training.method, method_weights)
    return weigh, adaptive_bonus(training) if training.method == ADAPTIVE else None


def adaptive_bonus(training: TrainingRun) -> Bonus:
    """Return TRL's adaptive coefficient: applied at or below the target, raised after such a step and lowered else."""
    coefficient, target = 0.0, TARGETS[training.policy]

    def bonus(entropy: float) -> float:
        nonlocal coefficient
        below, applied = entropy <= target, coefficient
        changed = coefficient + (training.strength if below else -training.strength)
        coefficient = min(max(changed, 0.0), MAX_COEFFICIENT)
        return applied if below else 0.0

    return bonus


def steer_weights(training: TrainingRun, policy: Policy, step_state: StepState, values: TokenValues) -> Tensor:
    """Return STEER's weights exp(-k |effect|), from 1 to the setting at the largest effect of the batch's tokens."""
    batch, advantages = step_state.batch, torch.tensor([r.advantage or 0.0 for r in step_state.rollouts])
    effect = fx.proxies.steer(values, advantages.unsqueeze(1) / values.logprobs.exp(), batch.completion_mask).abs()
    return (math.log(training.strength) * effect / effect.max().clamp(min=SMALLEST_EFFECT)).exp()


def controller() -> Weigh:
    """Return a function that measures every ``MEASURED``-th batch and weighs each by the estimates before it."""
    state, weight_of = fx.control.control_state(), dict[str, float]()

    def weigh(training: TrainingRun, policy: Policy, step_state: StepState, values: TokenValues) -> Tensor:
        nonlocal state, weight_of
        advantages = torch.tensor([r.advantage or 0.0 for r in step_state.rollouts])
        kinds = fx.control.kinds(fx.labels.regions(step_state.batch, values, advantages))
        in_force = fx.control.token_weights(kinds, weight_of).float()
        if step_state.step % MEASURED == 0 and advantages.any():
            sums = measure(policy, step_state, kinds, in_force)
            state = fx.control.update(state, sums, forgetting=FORGETTING, in_force=weight_of)
            entropy = float(values.entropies[step_state.batch.completion_mask].mean())
            options: dict[str, Any] = {"horizon": HORIZON, "confidence": training.strength, "bounds": BOUNDS}
            weight_of = fx.control.weights(state, entropy, TARGETS[training.policy], lr=training.lr, **options).by_kind
        return in_force

    return weigh


def measure(policy: Policy, step_state: StepState, kinds: fx.labels.Labels, in_force: Tensor) -> fx.control.KindSums:
    """Return the lifetime influences of a batch with the weights in force, on entropy and reward, by kind."""
    apply, params = fx.make_functional(policy.model)
    batch = step_state.batch
    assert batch.coefficients is not None
    weighted = batch._replace(coefficients=batch.coefficients * in_force)
    rewards = torch.tensor([r.reward or 0.0 for r in step_state.rollouts])
    entropy, reward = (
        fx.influence(
            params,
            weighted,
            None,
            fx.adamw_state(step_state.optimizer, policy.model),
            apply=apply,
            objective=objective,
            preconditioner="lifetime",
            max_grad_norm=MAX_NORM,
            labels=kinds,
        )
        for objective in (fx.Entropy(), fx.expected_reward(rewards))
    )
    return fx.control.kind_sums(entropy, reward, kinds)


def verdicts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return for each policy whether control pays by the criterion above, and by which part."""
    texts = {}
    for policy in dict.fromkeys(row["policy"] for row in rows):
        entered, target = [row for row in rows if row["policy"] == policy], TARGETS[policy]
        control = best([row for row in entered if row["method"] == CONTROL])
        others = [row for row in entered if row["method"] != CONTROL]
        gains = _low(control["pass_8_more"]) > 0 and _high(control["pass_1_more"]) >= 0
        holds = _is_near(control, target) and all(
            not _is_near(row, target) or row["pass_1"]["mean"] < control["pass_1"]["mean"] for row in others
        )
        is_cheap = control["cost"]["mean"] <= MAX_COST
        parts = [name for name, holding in (("pass@8", gains), ("the target", holds)) if holding]
        texts[policy] = f"pays, by {' and '.join(parts)}" if parts and is_cheap else "does not pay"
    return texts


def best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the row of the setting with the highest pass@1 + pass@8."""
    return max(rows, key=lambda row: row["pass_1"]["mean"] + row["pass_8"]["mean"])


def _is_near(row: Mapping[str, Any], target: float) -> bool:
    return abs(row["entropy"]["mean"] - target) <= NEAR * target


def _low(interval: Mapping[str, float | None]) -> float:
    return _end(interval, -1)


def _high(interval: Mapping[str, float | None]) -> float:
    return _end(interval, 1)


def _end(interval: Mapping[str, float | None], sign: int) -> float:
    """Return an end of a ``mean_interval``, which a single value has infinitely far away."""
    mean, half_width = interval["mean"], interval["half_width"]
    assert mean is not None
    return mean + sign * (math.inf if half_width is None else half_width)


def markdown(report: Mapping[str, Any]) -> str:
    """Return the verdict and the table of the page."""
    return "\n".join([*verdict_lines(report["summary"]), "", bench_acting.markdown(report)])


def verdict_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each policy: whether control pays there."""
    return [
        f"On {policy}, with the target {TARGETS[policy]:g}, control **{text}**."
        for policy, text in verdicts(rows).items()
    ]


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw entropy, pass@1 and pass@8 over steps, each method at its best setting."""
    rows = report["summary"]
    chosen = [
        best([row for row in rows if (row["policy"], row["method"]) == pair])
        for pair in dict.fromkeys((row["policy"], row["method"]) for row in rows)
    ]
    names = {(row["policy"], row["method"], row["setting"]) for row in chosen}
    runs = [run for run in report["runs"] if (run["policy"], run["method"], run["setting"]) in names]
    bench_acting.plot({**report, "runs": runs}, path, tuple(SETTINGS))


def training_runs(quick: bool) -> list[TrainingRun]:
    """Return the training runs of the benchmark."""
    if quick:
        small: dict[str, Any] = {"steps": 2 * MEASURED, "every": MEASURED, "prompts": 4, "judged": 4}
        return [
            TrainingRun("demo", method, 0, 1e-4, **small, setting=SETTINGS[method][-1])
            for method in ("grpo", ADAPTIVE, STEER, REPO, CONTROL)
        ]
    swept = [(method, setting) for method, settings in SETTINGS.items() for setting in settings]
    return [
        TrainingRun(policy, method, seed, 1e-4, 60, 20, setting=setting)
        for policy, entered in (("early", swept), ("harder", ON_HARDER.items()))
        for seed in range(SEEDS)
        for method, setting in entered
    ]


BENCHMARK = Benchmark(NAME, __doc__, training_runs, train, bench_acting.summary, markdown, plot=plot)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
