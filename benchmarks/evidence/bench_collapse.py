"""Measure which tokens lower the entropy: influence by advantage, probability, position and prompt, and concentration.

    python -m benchmarks collapse            writes results/collapse.json and its table in README.md;
                                             ten minutes on two cores, resumed where it stopped
    python -m benchmarks collapse --quick    one state, written nowhere, to check that it works

At several steps of GRPO training runs the influence of every token of U on the entropy is computed. Two claims are
tested: that tokens of high covariance of log-probability and advantage cause the fall, a few of them most of it (Cui et
al., arXiv 2505.22617, table 1 and figure 8), and that the fifth of the tokens with the highest entropy is what matters
(Wang et al., arXiv 2506.01939).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr

import fx_influence as fx
from benchmarks.evidence.training_runs import Benchmark, Policy, StepState, initial_policy, selected_step_states
from benchmarks.harness import format_interval, mean_interval
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.estimators.concentration import top_share
from fx_influence.types import Batch, TokenValues

NAME = "bench_collapse"
SEEDS, MAX_NORM = 5, 1.0
FRACTIONS = (0.0002, 0.002, 0.02, 0.2, 0.5)
BY_REGION = ("A > 0, likely", "A > 0, unlikely", "A < 0, likely", "A < 0, unlikely")
"""Names of the first four regions of ``fx.labels.regions``, in their order."""


class TrainingRun(NamedTuple):
    """A GRPO run that is measured before each of its ``steps``."""

    policy: str
    lr: float
    seed: int
    steps: tuple[int, ...] = (5, 20, 40)
    prompts: int = 64
    evaluated: int = 256

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.lr:g}-{self.seed}"


def train(training: TrainingRun) -> list[dict[str, Any]]:
    """Return the influences of the tokens at each of the ``steps``."""
    policy = initial_policy(training.policy)
    states = selected_step_states(policy, training.lr, training.seed, training.steps, training.prompts, 8)
    return [{"step": step_state.step, **measure(training, policy, step_state)} for step_state in states]


def measure(training: TrainingRun, policy: Policy, step_state: StepState) -> dict[str, Any]:
    """Return the figures of the tokens of a step, see ``figures_of_tokens``."""
    apply, params = fx.make_functional(policy.model)
    e = policy.evaluation(training.evaluated, 16, step_state.rng.randrange(2**30))
    state, batch = fx.adamw_state(step_state.optimizer, policy.model), step_state.batch
    out = fx.influence(params, batch, e, state, apply=apply, max_grad_norm=MAX_NORM, stderr=False)
    values = all_token_values(params, batch, apply)
    return figures_of_tokens(out, batch, values, step_state.rollouts, training.lr)


def figures_of_tokens(
    out: fx.Influence, batch: Batch, values: TokenValues, rollouts: Sequence[fx.Rollout], lr: float
) -> dict[str, Any]:
    """Return sums in nats in this step by kind of token, and shares of the sum of |influence| over tokens.

    Args:
        out: influences of the tokens of U.
        batch: U, (n, T).
        values: (n, T), token values of U before the step.
        rollouts: the n records of U, with advantages and rewards.
        lr: learning rate of the step.
    """
    assert out.per_token is not None
    mask = batch.completion_mask
    delta = lr * out.per_token[mask].numpy()
    logprob, entropy = (x[mask].double().numpy() for x in values)
    row = mask.nonzero()[:, 0].numpy()
    advantages = np.array([r.advantage or 0.0 for r in rollouts])
    advantage = advantages[row]
    position = ((mask.cumsum(1) - 1)[mask] / mask.sum(1)[row]).numpy()
    proxy = (logprob - logprob.mean()) * (advantage - advantage.mean())
    by = {"covariance": proxy, "entropy": entropy}
    solved = np.array([r.reward or 0.0 for r in rollouts])
    group = np.array([r.group for r in rollouts])
    easy = np.array([solved[group == g].mean() >= 0.5 for g in group])[row]
    region = fx.labels.regions(batch, values, torch.from_numpy(advantages)).index[mask].numpy()
    cells = {name: region == k for k, name in enumerate(BY_REGION)}
    thirds = {f"{name} third": (3 * position).astype(int) == k for k, name in enumerate(("first", "middle", "last"))}
    cells |= thirds | {f"{a}, {b}": cells[a] & thirds[b] for a in cells for b in thirds}
    cells |= {"easy prompts": easy, "hard prompts": ~easy}
    cells |= {f"top {share:.0%} by {name}": _top(x, share) for name, x in by.items() for share in (0.02, 0.2)}
    return {
        "tokens": len(delta),
        "rollouts": float(delta.sum()),
        "momentum": lr * float(out.momentum),
        "cells": {name: _cell(delta, members) for name, members in cells.items()},
        "ranks": {name: float(spearmanr(-x, delta).statistic) for name, x in by.items()},
        "concentration": {
            "influence": [float(top_share(torch.from_numpy(delta), f)) for f in FRACTIONS],
            "covariance": [float(top_share(torch.from_numpy(proxy), f)) for f in FRACTIONS],
        },
    }


def _top(values: np.ndarray, fraction: float) -> np.ndarray:
    members = np.zeros(len(values), dtype=bool)
    members[np.argsort(-values, kind="stable")[: math.ceil(fraction * len(values))]] = True
    return members


def _cell(delta: np.ndarray, members: np.ndarray) -> dict[str, float]:
    values = delta[members]
    return {
        "of_tokens": float(members.mean()),
        "sum": float(values.sum()),
        "share": float(np.abs(values).sum() / np.abs(delta).sum()),
        "of_falls": float(values.clip(max=0).sum() / delta.clip(max=0).sum()),
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return means with 95% intervals over seeds of each seed's mean over its steps, by policy and learning rate."""
    groups: dict[tuple[str, float], list[list[dict[str, Any]]]] = {}
    for run in runs:
        groups.setdefault((run["policy"], run["lr"]), []).append(run["found"])
    return [
        {
            "policy": policy,
            "lr": lr,
            "cells": {
                name: {
                    field: mean_interval(
                        [float(np.mean([s["cells"][name][field] for s in states])) for states in of_seeds]
                    )
                    for field in of_seeds[0][0]["cells"][name]
                }
                for name in of_seeds[0][0]["cells"]
            },
            "ranks": {
                name: mean_interval([float(np.mean([s["ranks"][name] for s in states])) for states in of_seeds])
                for name in of_seeds[0][0]["ranks"]
            },
            "concentration": {
                kind: [
                    mean_interval(
                        [float(np.mean([s["concentration"][kind][k] for s in states])) for states in of_seeds]
                    )
                    for k in range(len(FRACTIONS))
                ]
                for kind in ("influence", "covariance")
            },
        }
        for (policy, lr), of_seeds in groups.items()
    ]


SUMMARY_KINDS = (*BY_REGION, "top 2% by covariance", "top 20% by entropy")
"""Kinds of tokens in the short table."""


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table of the main kinds of tokens."""
    return "\n".join(_kinds(report))


def appendix(report: Mapping[str, Any], unit: float = 1e-6) -> str:
    """Return the table of all kinds of tokens, rank correlations, and the shares of the largest; sums in ``unit``."""
    rows = report["summary"]
    lines = _kinds(report, list(rows[0]["cells"]), unit)
    for name in rows[0]["ranks"]:
        cells = (format_interval(row["ranks"][name], "+.2f") for row in rows)
        lines.append(f"| Spearman of influence with minus {name} | {' | '.join(cells)} |")
    for kind in ("influence", "covariance"):
        for k, fraction in enumerate(FRACTIONS):
            cells = (_percent(row["concentration"][kind][k]) for row in rows)
            lines.append(f"| top {100 * fraction:g}% by |{kind}|, share of its sum | {' | '.join(cells)} |")
    return "\n".join(lines)


def _kinds(report: Mapping[str, Any], names: Sequence[str] = SUMMARY_KINDS, unit: float = 1e-6) -> list[str]:
    rows = report["summary"]
    titles = " | ".join(f"{row['policy']}, lr {row['lr']:g}" for row in rows)
    exponent = f"1e{math.log10(unit):.0f}"
    head = f"tokens: share of tokens, of all influence, of all that lowers; sum in {exponent} nats per step"
    cells = [f"| {name} | {' | '.join(_cell_text(row['cells'][name], unit) for row in rows)} |" for name in names]
    return [f"| {head} | {titles} |", "|---|" + "---|" * len(rows), *cells]


def _cell_text(cell: Mapping[str, Any], unit: float) -> str:
    shares = ", ".join(_percent(cell[name]) for name in ("of_tokens", "share", "of_falls"))
    return f"{shares}; {format_interval(cell['sum'], '+.3g', 1 / unit)}"


def _percent(summary: Mapping[str, float | None] | None) -> str:
    return f"{format_interval(summary, '.0f', 100)}%"


def training_runs(quick: bool) -> list[TrainingRun]:
    """Return the training runs of the benchmark."""
    if quick:
        return [TrainingRun("demo", 1e-4, seed, steps=(1,), prompts=4, evaluated=4) for seed in (0, 1)]
    return [TrainingRun(policy, lr, seed) for policy, lr in (("demo", 1e-4), ("early", 1e-4)) for seed in range(SEEDS)]


BENCHMARK = Benchmark(NAME, __doc__, training_runs, train, summary, markdown, appendix)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
