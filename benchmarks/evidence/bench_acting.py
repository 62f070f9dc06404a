"""Does acting on influences help? GRPO with weights that keep the entropy, beside other methods against its fall.

    python -m benchmarks acting            writes results/acting.json and its table in README.md;
                                           half an hour on two cores, resumed where it stopped
    python -m benchmarks acting --quick    a few steps, written nowhere, to check that it works

The embedded policy's arithmetic before its own GRPO steps ("early"), and longer chains of larger numbers. Every method
makes the same optimizer steps from the same state on as many rollouts: plain GRPO; an entropy bonus; a higher upper
clip (DAPO, arXiv 2503.14476); Clip-Cov and KL-Cov (arXiv 2505.22617); rollouts or tokens weighted by
``fx.lab.select`` so that the predicted entropy does not fall. Processor seconds give the cost.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fx_influence as fx
from benchmarks.evidence.training_runs import Benchmark, Policy, StepState, initial_policy, step_states
from benchmarks.harness import format_interval, mean_interval, svg_figure
from fx_influence.batching.rows import select_rows
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.types import Batch, TokenValues

NAME = "bench_acting"
SEEDS, MAX_NORM, UPDATES = 5, 1.0, 2
METHODS = ("grpo", "bonus", "clip higher", "clip-cov", "kl-cov", "rollouts", "tokens")
CLIP, COVARIANT = 0.2, 0.02
"""Bound of the ratio on both sides of 1, and the share of the tokens that KL-Cov penalises."""

SETTINGS = {"bonus": 0.02, "clip higher": 0.28, "clip-cov": 0.02, "kl-cov": 1.0}
"""A number for each method: the entropy's coefficient, the upper bound, the share of the tokens that Clip-Cov detaches,
KL-Cov's penalty. Both papers' shares are far smaller."""


class TrainingRun(NamedTuple):
    """A run of a method."""

    policy: str
    method: str
    seed: int
    lr: float
    steps: int
    every: int = 20
    prompts: int = 16
    judged: int = 128
    is_stored: bool = True
    setting: float | None = None

    @property
    def name(self) -> str:
        setting = "" if self.setting is None else f"-{self.setting:g}"
        return f"{self.policy}-{self.method}{setting}-{self.seed}"

    @property
    def strength(self) -> float:
        """The method's number, its default where none is given; 0 for methods without."""
        return SETTINGS.get(self.method, 0.0) if self.setting is None else self.setting


Weigh = Callable[[TrainingRun, Policy, StepState, TokenValues], Tensor]
"""Function of a training run and the values of U's tokens before the steps on a batch: weights (n, T) of the tokens."""

Bonus = Callable[[float], float]
"""Function of the mean entropy of a step's tokens: the coefficient of the entropy in the step."""


def train(training: TrainingRun) -> list[dict[str, Any]]:
    """Return figures of a training run with the weights of its method; see ``train_weighted``."""
    return train_weighted(training, method_weights)


def train_weighted(training: TrainingRun, weigh: Weigh, bonus: Bonus | None = None) -> list[dict[str, Any]]:
    """Return entropy, accuracy and elapsed seconds at the beginning and after every ``every`` steps."""
    policy = initial_policy(training.policy, training.is_stored)
    beginning = {"step": 0, "seconds": 0.0, **evaluate(training, policy)}
    return [beginning, *train_policy(training, policy, 8, evaluate, weigh, bonus)]


def train_policy(
    training: TrainingRun,
    policy: Policy,
    completions: int,
    evaluate: Callable[[TrainingRun, Policy], dict[str, Any]],
    weigh: Weigh,
    bonus: Bonus | None = None,
) -> Iterator[dict[str, Any]]:
    """Train a policy; yield its evaluation and the elapsed processor seconds after every ``every`` batches.

    Args:
        training: the training run.
        policy: what it begins with, which the steps change.
        completions: completions of each prompt.
        evaluate: function of the training run and the policy, whose seconds do not count.
        weigh: weights of the tokens of each batch.
        bonus: the entropy's coefficient, by default the setting of the method "bonus".
    """
    coefficient = training.strength if training.method == "bonus" else 0.0
    bonus = bonus or (lambda _: coefficient)
    seconds, start = 0.0, time.process_time()
    for step_state in step_states(policy, training.lr, training.seed, training.steps, training.prompts, completions):
        values = values_before(policy, step_state)
        update(training, policy, step_state, values, weigh(training, policy, step_state, values), bonus)
        seconds += time.process_time() - start
        if step_state.step % training.every == 0:
            yield {"step": step_state.step, "seconds": seconds, **evaluate(training, policy)}
        start = time.process_time()


def values_before(policy: Policy, step_state: StepState) -> TokenValues:
    """Return log-probabilities and entropies of a batch's tokens before the steps on it."""
    with torch.no_grad():
        return TokenValues(*policy.score(step_state.batch))


def method_weights(training: TrainingRun, policy: Policy, step_state: StepState, values: TokenValues) -> Tensor:
    """Return the weights of a method that selects rollouts or tokens, 1 for others and without advantages."""
    if training.method in ("rollouts", "tokens") and any(r.advantage for r in step_state.rollouts):
        return selected_weights(training, policy, step_state)
    return torch.ones(step_state.batch.input_ids.shape)


def evaluate(training: TrainingRun, policy: Policy) -> dict[str, float]:
    """Return entropy, pass@1 and pass@8 from eight completions of held-out prompts, always with the same seed."""
    entropy, solved = entropy_and_solved(training, policy)
    return {"entropy": entropy, "pass_1": float(solved.mean()), "pass_8": float(solved.max(1).mean())}


def entropy_and_solved(training: TrainingRun, policy: Policy) -> tuple[float, np.ndarray]:
    """Return the entropy per token and whether completions (prompts, 8) are right, those of reward 1."""
    rollouts = policy.sample(policy.held_out[: training.judged], 8, 10**9)
    solved = np.array([float(r.reward == 1.0) for r in rollouts]).reshape(-1, 8)
    batch = collate(rollouts, policy.tokenizer.pad_token_id)
    with torch.no_grad():
        entropy = policy.score(batch)[1][batch.completion_mask].mean()
    return float(entropy), solved


def update(
    training: TrainingRun, policy: Policy, step_state: StepState, values: TokenValues, weights: Tensor, bonus: Bonus
) -> None:
    """Make the optimizer steps on one batch, one for each random half.

    Args:
        training: the training run.
        policy: the policy, which the steps change.
        step_state: the batch.
        values: of its tokens before the steps.
        weights: (n, T), of its tokens.
        bonus: the entropy's coefficient.
    """
    batch, of_rollouts = step_state.batch, torch.tensor([r.advantage or 0.0 for r in step_state.rollouts])
    old, entropies = values
    advantages, covariant = of_rollouts.unsqueeze(1).expand_as(old), torch.zeros_like(batch.completion_mask)
    if training.method in ("clip-cov", "kl-cov"):
        share = training.strength if training.method == "clip-cov" else COVARIANT
        covariant = covariant_tokens(old, advantages, batch.completion_mask, share)
    if training.method == "repo":
        advantages = advantages - training.strength * (old + entropies)
    for rows in torch.tensor(step_state.rng.sample(range(len(old)), len(old))).chunk(UPDATES):
        part = select_rows(batch, rows)
        objective, entropy = _clipped_objective(training, policy, part, old[rows], advantages[rows], covariant[rows])
        scale = 1 / (len(rows) * policy.task.max_new_tokens)
        coefficient = bonus(float(entropy.detach().sum() / part.completion_mask.sum()))
        step_state.optimizer.zero_grad()
        (-scale * ((weights[rows] * objective).sum() + coefficient * entropy.sum())).backward()
        nn.utils.clip_grad_norm_(policy.model.parameters(), MAX_NORM)
        step_state.optimizer.step()


def _clipped_objective(
    training: TrainingRun, policy: Policy, batch: Batch, old: Tensor, advantages: Tensor, covariant: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each token's clipped objective and the entropies, 0 outside completions."""
    logprobs, entropies = policy.score(batch)
    mask = batch.completion_mask
    ratio = torch.where(mask, logprobs - old, 0.0).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + (training.strength if training.method == "clip higher" else CLIP))
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if training.method == "clip-cov":
        objective = torch.where(covariant, objective.detach(), objective)
    if training.method == "kl-cov":
        objective = objective - torch.where(covariant, training.strength * (logprobs - old).abs(), 0.0)
    return objective * mask, entropies * mask


def covariant_tokens(old: Tensor, advantages: Tensor, mask: Tensor, share: float) -> Tensor:
    """Return a mask of a share of the tokens, those with the highest covariance of log-probability and advantage."""
    proxy = (old - old[mask].mean()) * (advantages - advantages[mask].mean())
    return mask & (proxy >= torch.quantile(proxy[mask], 1 - share))


def selected_weights(training: TrainingRun, policy: Policy, step_state: StepState) -> Tensor:
    """Return weights of U's tokens that keep the entropy predicted for a step on all of U constant."""
    rollouts: list[Rollout] = policy.sample(policy.held_out[-64:], 2, step_state.rng.randrange(2**30))
    e = collate(rollouts, policy.tokenizer.pad_token_id)
    apply, params = fx.make_functional(policy.model)
    state = fx.adamw_state(step_state.optimizer, policy.model)
    per_token = training.method == "tokens"
    options: dict[str, Any] = {"apply": apply, "max_grad_norm": MAX_NORM, "stderr": False, "per_token": per_token}
    entropy = fx.influence(params, step_state.batch, e, state, **options)
    objective = fx.expected_reward(torch.tensor([r.reward or 0.0 for r in rollouts]))
    reward = fx.influence(params, step_state.batch, e, state, objective=objective, **options)
    weights = fx.lab.select(entropy, reward, floor=0.0, per_token=per_token).weights.float()
    return weights if per_token else weights.unsqueeze(1).expand(step_state.batch.input_ids.shape)


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return figures by policy, method and setting over seeds, at the end and when plain GRPO had ended."""
    plain = {(r["policy"], r["seed"]): r["found"][-1] for r in runs if r["method"] == "grpo"}
    groups: dict[tuple[str, str, float | None], list[dict[str, float]]] = {}
    for run in runs:
        grpo = plain[run["policy"], run["seed"]]
        last, in_time = run["found"][-1], [s for s in run["found"] if s["seconds"] <= 1.02 * grpo["seconds"]][-1]
        figures = {name: last[name] for name in ("entropy", "pass_1", "pass_8")}
        # Differences at the same seed, which has the same prompts.
        figures |= {f"{name}_more": last[name] - grpo[name] for name in ("pass_1", "pass_8")}
        figures |= {"cost": last["seconds"] / grpo["seconds"], "in_time": in_time["pass_1"] - grpo["pass_1"]}
        groups.setdefault((run["policy"], run["method"], run["setting"]), []).append(figures)
    return [
        {
            "policy": policy,
            "method": method,
            "setting": setting,
            **{name: mean_interval([run[name] for run in figures]) for name in figures[0]},
        }
        for (policy, method, setting), figures in groups.items()
    ]


COLUMNS = {
    "entropy": "entropy",
    "pass_1": "pass@1",
    "pass_8": "pass@8",
    "pass_1_more": "pass@1 minus GRPO's",
    "pass_8_more": "pass@8 minus GRPO's",
    "cost": "seconds / GRPO's",
    "in_time": "pass@1 minus GRPO's, in its time",
}


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table of the page."""
    return table(report["summary"], COLUMNS)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Return the table of rows of a ``summary`` with these columns, titles by name of a figure."""
    lines = [f"| task, method | {' | '.join(columns.values())} |", "|---|" + "---|" * len(columns)]
    for row in rows:
        cells = [
            format_interval(row[name], "+.3f" if "GRPO's" in title and name != "cost" else ".3f")
            for name, title in columns.items()
        ]
        # The stored figures of ``acting`` are older than settings.
        setting = "" if row.get("setting") is None else f" {row['setting']:g}"
        lines.append(f"| {row['policy']}, {row['method']}{setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(report: Mapping[str, Any], path: Path, methods: Sequence[str] = METHODS) -> None:
    """Draw entropy, pass@1 and pass@8 over steps, each method's mean over seeds with the interval at the end."""
    policies = list(dict.fromkeys(run["policy"] for run in report["runs"]))
    with svg_figure(path, len(policies), 3, (9, 5.4)) as axes:
        for policy, row in zip(policies, axes, strict=True):
            for axis, field in zip(row, ("entropy", "pass_1", "pass_8"), strict=True):
                for k, method in enumerate(methods):
                    runs = [r["found"] for r in report["runs"] if (r["policy"], r["method"]) == (policy, method)]
                    mean = [np.mean([run[i][field] for run in runs]) for i in range(len(runs[0]))]
                    (line,) = axis.plot([s["step"] for s in runs[0]], mean, lw=1.2, label=method, color=f"C{k}")
                    end = mean_interval([run[-1][field] for run in runs]) or {}
                    x = runs[0][-1]["step"] * (1.02 + 0.02 * k)
                    axis.errorbar([x], [mean[-1]], [end.get("half_width") or 0.0], color=line.get_color(), lw=1)
                axis.set(xlabel="batches", title=f"{policy}: {COLUMNS[field]}")
        handles, labels = axes[0][0].get_legend_handles_labels()
        axes[0][0].figure.legend(handles, labels, loc="outside upper center", ncols=len(methods), frameon=False)


def training_runs(quick: bool) -> list[TrainingRun]:
    """Return the training runs of the benchmark."""
    if quick:
        return [TrainingRun("demo", method, 0, 1e-4, steps=2, every=2, prompts=2, judged=4) for method in METHODS]
    return [
        TrainingRun(policy, method, seed, lr, steps, every)
        for policy, lr, steps, every in (("early", 1e-4, 60, 20), ("harder", 2e-5, 30, 10))
        for seed in range(SEEDS)
        for method in METHODS
    ]


BENCHMARK = Benchmark(NAME, __doc__, training_runs, train, summary, markdown, plot=plot)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
