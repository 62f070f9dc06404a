"""Does a selection keep what it promises? Weights by ``fx.lab.select`` from E of two sizes, judged on other rollouts.

    python -m benchmarks selection            writes results/selection.json and EVIDENCE.md;
                                              five minutes on two cores, continued where it stopped
    python -m benchmarks selection --quick    one small state, written nowhere: it only shows that this works

Before steps of GRPO trainings the weights are chosen that keep the entropy foretold for the step where it is, at the
least loss of reward foretold, both from one E. On another, larger E of other prompts the same weights raise the entropy
by less, and cost reward: whoever picks by an estimate picks its errors too.
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
from benchmarks.evidence.trainings import Benchmark, Moment, Policy, moments_at, started
from benchmarks.harness import interval, shown
from fx_influence.interop.rollouts.batch import collate

NAME = "bench_selection"
SEEDS, MAX_NORM = 5, 1.0


class Training(NamedTuple):
    """One GRPO run that is stopped at ``steps`` for measuring."""

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


def train(training: Training) -> list[dict[str, Any]]:
    """Of each of the ``steps`` what was promised and kept."""
    policy = started(training.policy)
    chosen = moments_at(policy, training.lr, training.seed, training.steps, training.prompts, 8)
    return [{"step": now.step, "selections": measure(training, policy, now)} for now in chosen]


def measure(training: Training, policy: Policy, now: Moment) -> list[dict[str, Any]]:
    """Rises of the entropy, in nats per unit lr, and losses of reward, by the E of the weights and by another."""
    asked = draw_prompts(random.Random(now.rng.randrange(2**30)), training.judged, set(), "", policy.task)
    half, seed = training.judged // 2, now.rng.randrange(2**30)
    entropy, reward = influences(policy, now, asked[half:], seed)
    found = []
    for size in training.sizes:
        own = influences(policy, now, asked[: size // 2], seed + size)
        for unit in ("rollouts", "tokens"):
            chosen = fx.lab.select(*own, floor=0.0, per_token=unit == "tokens")
            out = 1 - chosen.weights
            parts: list[Any] = [x.per_token if unit == "tokens" else x.per_sequence for x in (entropy, reward)]
            found.append(
                {
                    "rollouts": size,
                    "unit": unit,
                    "left_out": float(out[now.batch.completion_mask].mean() if unit == "tokens" else out.mean()),
                    "promised": float(chosen.entropy - own[0].total),
                    "kept": float(-(out * parts[0]).sum()),
                    "reward_promised": float(chosen.reward - own[1].total),
                    "reward_kept": float(-(out * parts[1]).sum()),
                    "reward_of_all": float(reward.per_sequence.sum()),
                }
            )
    return found


def influences(policy: Policy, now: Moment, prompts: Sequence[Any], seed: int) -> tuple[fx.Influence, fx.Influence]:
    """Of U on the entropy and on the reward, over two completions of every prompt."""
    drawn = policy.drawn(prompts, 2, seed)
    e = collate(drawn, policy.tokenizer.pad_token_id)
    apply, params = fx.make_functional(policy.model)
    state = fx.adamw_state(now.optimizer, policy.model)
    query = fx.expected_reward(torch.tensor([r.reward or 0.0 for r in drawn]))
    options: dict[str, Any] = {"apply": apply, "max_grad_norm": MAX_NORM, "stderr": False}
    entropy = fx.influence(params, now.batch, e, state, **options)
    return entropy, fx.influence(params, now.batch, e, state, objective=query, **options)


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By size of E and unit, over seeds: means over a seed's steps, of entropy in nats and reward in this step."""
    groups: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for run in runs:
        of_seed: dict[tuple[str, int, str], list[dict[str, float]]] = {}
        for state in run["found"]:
            for x in state["selections"]:
                of_seed.setdefault((run["policy"], x["rollouts"], x["unit"]), []).append(x)
        for key, found in of_seed.items():
            scales = {name: 1.0 if name == "left_out" else run["lr"] for name in COLUMNS}
            means = {name: scale * fmean(float(x[name]) for x in found) for name, scale in scales.items()}
            groups.setdefault(key, []).append(means)
    return [
        {"policy": policy, "rollouts": size, "unit": unit}
        | {name: interval([one[name] for one in of_seeds]) for name in COLUMNS}
        for (policy, size, unit), of_seeds in groups.items()
    ]


COLUMNS = {
    "left_out": "left out",
    "promised": "entropy more than with all, promised",
    "kept": "on other rollouts",
    "reward_of_all": "gain in reward of all",
    "reward_promised": "with weights more, promised",
    "reward_kept": "on other rollouts",
}


def markdown(report: Mapping[str, Any]) -> str:
    """By size of E: what is left out, and what that changes, as promised and by other rollouts."""
    lines = [
        f"| weights of, by E of; changes a step in 1e-4 nats and 1e-4 of reward | {' | '.join(COLUMNS.values())} |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for row in report["summary"]:
        cells = [f"{shown(row['left_out'], '.0f', 100)}%"]
        cells += [shown(row[name], "+.0f", 1e4) for name in COLUMNS if name != "left_out"]
        lines.append(f"| {row['policy']}, {row['unit']}, {row['rollouts']} rollouts | {' | '.join(cells)} |")
    return "\n".join(lines)


def trainings(quick: bool) -> list[Training]:
    """All that is run."""
    if quick:
        return [Training("demo", seed, steps=(1,), prompts=2, sizes=(8,), judged=32) for seed in (0, 1)]
    return [Training("early", seed) for seed in range(SEEDS)]


BENCHMARK = Benchmark(NAME, __doc__, trainings, train, summary, markdown)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
