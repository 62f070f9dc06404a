"""Does a selection hold on other rollouts? Weights by ``fx.lab.select`` from E of two sizes, evaluated on another E.

    python -m benchmarks selection            writes results/selection.json and its table in README.md;
                                              five minutes on two cores, resumed where it stopped
    python -m benchmarks selection --quick    one small state, written nowhere, to check that it works

Before steps of GRPO training runs, weights are selected that keep the entropy predicted for the step constant at the
least loss of predicted reward, both from one E. On another, larger E of other prompts the same weights raise the
entropy by less, and cost reward: selecting by an estimate selects its errors too.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch

import fx_influence as fx
from benchmarks.evidence.arithmetic import draw_prompts
from benchmarks.evidence.training_runs import Benchmark, Policy, StepState, initial_policy, selected_step_states
from benchmarks.harness import format_interval, mean_interval
from fx_influence.interop.rollouts.batch import collate

NAME = "bench_selection"
SEEDS, MAX_NORM = 5, 1.0


class TrainingRun(NamedTuple):
    """A GRPO run that is measured before each of its ``steps``."""

    policy: str
    seed: int
    lr: float = 1e-4
    steps: tuple[int, ...] = (1, 10, 20)
    prompts: int = 16
    sizes: tuple[int, ...] = (128, 1024)
    judged: int = 4096

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.seed}"


def train(training: TrainingRun) -> list[dict[str, Any]]:
    """Return the predicted and the actual effects of the selections at each of the ``steps``."""
    policy = initial_policy(training.policy)
    states = selected_step_states(policy, training.lr, training.seed, training.steps, training.prompts, 8)
    return [{"step": step_state.step, "selections": measure(training, policy, step_state)} for step_state in states]


def measure(training: TrainingRun, policy: Policy, step_state: StepState) -> list[dict[str, Any]]:
    """Return the changes of entropy and reward, per unit lr, as estimated on the E of the selection and on another."""
    prompts = draw_prompts(random.Random(step_state.rng.randrange(2**30)), training.judged, set(), "", policy.task)
    half, seed = training.judged // 2, step_state.rng.randrange(2**30)
    entropy, reward = influences(policy, step_state, prompts[half:], seed)
    selections = []
    for size in training.sizes:
        estimated = influences(policy, step_state, prompts[: size // 2], seed + size)
        for unit in ("rollouts", "tokens"):
            selection = fx.lab.select(*estimated, floor=0.0, per_token=unit == "tokens")
            removed = 1 - selection.weights
            evaluated: list[Any] = [x.per_token if unit == "tokens" else x.per_sequence for x in (entropy, reward)]
            selections.append(
                {
                    "rollouts": size,
                    "unit": unit,
                    "left_out": float(
                        removed[step_state.batch.completion_mask].mean() if unit == "tokens" else removed.mean()
                    ),
                    "promised": float(selection.entropy - estimated[0].total),
                    "kept": float(-(removed * evaluated[0]).sum()),
                    "reward_promised": float(selection.reward - estimated[1].total),
                    "reward_kept": float(-(removed * evaluated[1]).sum()),
                    "reward_of_all": float(reward.per_sequence.sum()),
                }
            )
    return selections


def influences(
    policy: Policy, step_state: StepState, prompts: Sequence[Any], seed: int
) -> tuple[fx.Influence, fx.Influence]:
    """Return the influences of U on entropy and reward, from two completions of every prompt.

    Args:
        policy: the policy before the step.
        step_state: optimizer and U before the step.
        prompts: prompts of E.
        seed: of the sampling.
    """
    rollouts = policy.sample(prompts, 2, seed)
    e = collate(rollouts, policy.tokenizer.pad_token_id)
    apply, params = fx.make_functional(policy.model)
    state = fx.adamw_state(step_state.optimizer, policy.model)
    objective = fx.expected_reward(torch.tensor([r.reward or 0.0 for r in rollouts]))
    options: dict[str, Any] = {"apply": apply, "max_grad_norm": MAX_NORM, "stderr": False}
    entropy = fx.influence(params, step_state.batch, e, state, **options)
    return entropy, fx.influence(params, step_state.batch, e, state, objective=objective, **options)


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return means over seeds by size of E and unit; a seed counts with its mean over steps, in nats per step."""
    groups: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for run in runs:
        by_key: dict[tuple[str, int, str], list[dict[str, float]]] = {}
        for state in run["found"]:
            for x in state["selections"]:
                by_key.setdefault((run["policy"], x["rollouts"], x["unit"]), []).append(x)
        for key, selections in by_key.items():
            scales = {name: 1.0 if name == "left_out" else run["lr"] for name in COLUMNS}
            means = {name: scale * fmean(float(x[name]) for x in selections) for name, scale in scales.items()}
            groups.setdefault(key, []).append(means)
    return [
        {"policy": policy, "rollouts": size, "unit": unit}
        | {name: mean_interval([means[name] for means in seed_means]) for name in COLUMNS}
        for (policy, size, unit), seed_means in groups.items()
    ]


COLUMNS = {
    "left_out": "left out",
    "promised": "entropy, minus that with all, predicted",
    "kept": "on other rollouts",
    "reward_of_all": "reward gained by all",
    "reward_promised": "reward, minus that with all, predicted",
    "reward_kept": "on other rollouts",
}


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table by size of E: the share left out, and the changes as predicted and on other rollouts."""
    lines = [
        f"| weights of, from E of; changes per step in 1e-4 nats and 1e-4 of reward | {' | '.join(COLUMNS.values())} |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for row in report["summary"]:
        cells = [f"{format_interval(row['left_out'], '.0f', 100)}%"]
        cells += [format_interval(row[name], "+.0f", 1e4) for name in COLUMNS if name != "left_out"]
        lines.append(f"| {row['policy']}, {row['unit']}, {row['rollouts']} rollouts | {' | '.join(cells)} |")
    return "\n".join(lines)


def training_runs(quick: bool) -> list[TrainingRun]:
    """Return the training runs of the benchmark."""
    if quick:
        return [TrainingRun("demo", seed, steps=(1,), prompts=2, sizes=(8,), judged=32) for seed in (0, 1)]
    return [TrainingRun("early", seed) for seed in range(SEEDS)]


BENCHMARK = Benchmark(NAME, __doc__, training_runs, train, summary, markdown)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
