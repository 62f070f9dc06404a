"""Who makes the entropy fall? Influence by advantage, probability, position and prompt, and how concentrated it is.

    python -m benchmarks collapse            writes results/collapse.json and EVIDENCE.md;
                                             ten minutes on two cores, continued where it stopped
    python -m benchmarks collapse --quick    one state, written nowhere: it only shows that this works

At several steps of GRPO trainings every token of U gets its influence on the entropy. The claims that are tested: that
tokens of high covariance of log-probability and advantage make the fall, a few of them most of it (Cui et al., arXiv
2505.22617, table 1 and figure 8), and that the fifth of the tokens with the highest entropy is what matters (Wang et
al., arXiv 2506.01939).
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
from benchmarks.evidence.trainings import Benchmark, Moment, Policy, moments_at, started
from benchmarks.harness import interval, shown
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.estimators.concentration import top_share

NAME = "bench_collapse"
SEEDS, MAX_NORM = 5, 1.0
FRACTIONS = (0.0002, 0.002, 0.02, 0.2, 0.5)


class Training(NamedTuple):
    """One GRPO run that is stopped at ``steps`` for measuring."""

    policy: str
    lr: float
    seed: int
    steps: tuple[int, ...] = (5, 20, 40)
    prompts: int = 64
    evaluated: int = 256

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.lr:g}-{self.seed}"


def train(training: Training) -> list[dict[str, Any]]:
    """Of each of the ``steps`` what its tokens do."""
    policy = started(training.policy)
    chosen = moments_at(policy, training.lr, training.seed, training.steps, training.prompts, 8)
    return [{"step": now.step, **measure(training, policy, now)} for now in chosen]


def measure(training: Training, policy: Policy, now: Moment) -> dict[str, Any]:
    """Sums are nats in this step; shares of the sum of |influence| over tokens."""
    apply, params = fx.make_functional(policy.model)
    e = policy.evaluation(training.evaluated, 16, now.rng.randrange(2**30))
    state = fx.adamw_state(now.optimizer, policy.model)
    out = fx.influence(params, now.batch, e, state, apply=apply, max_grad_norm=MAX_NORM, stderr=False)
    assert out.per_token is not None
    values, mask = all_token_values(params, now.batch, apply), now.batch.completion_mask
    delta = training.lr * out.per_token[mask].numpy()
    logprob, entropy = (x[mask].double().numpy() for x in values)
    row = mask.nonzero()[:, 0].numpy()
    advantage = np.array([r.advantage or 0.0 for r in now.rollouts])[row]
    place = ((mask.cumsum(1) - 1)[mask] / mask.sum(1)[row]).numpy()
    proxy = (logprob - logprob.mean()) * (advantage - advantage.mean())
    by = {"covariance": proxy, "entropy": entropy}
    solved = np.array([r.reward or 0.0 for r in now.rollouts])
    group = np.array([r.group for r in now.rollouts])
    easy = np.array([solved[group == g].mean() >= 0.5 for g in group])[row]
    # More probable than the policy's own mean log-probability: there theory has the sign turn.
    likely = logprob >= -entropy
    cells = {
        f"A {sign} 0, {kind}": chosen & which
        for sign, chosen in ((">", advantage > 0), ("<", advantage < 0))
        for kind, which in (("likely", likely), ("unlikely", ~likely))
    }
    thirds = {f"{name} third": (3 * place).astype(int) == k for k, name in enumerate(("first", "middle", "last"))}
    cells |= thirds | {f"{a}, {b}": cells[a] & thirds[b] for a in cells for b in thirds}
    cells |= {"easy prompts": easy, "hard prompts": ~easy}
    cells |= {f"top {share:.0%} by {name}": _top(x, share) for name, x in by.items() for share in (0.02, 0.2)}
    return {
        "tokens": len(delta),
        "rollouts": float(delta.sum()),
        "momentum": training.lr * float(out.momentum),
        "cells": {name: _cell(delta, chosen) for name, chosen in cells.items()},
        "ranks": {name: float(spearmanr(-x, delta).statistic) for name, x in by.items()},
        "concentration": {
            "influence": [float(top_share(torch.from_numpy(delta), f)) for f in FRACTIONS],
            "covariance": [float(top_share(torch.from_numpy(proxy), f)) for f in FRACTIONS],
        },
    }


def _top(values: np.ndarray, fraction: float) -> np.ndarray:
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-values, kind="stable")[: math.ceil(fraction * len(values))]] = True
    return chosen


def _cell(delta: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    part = delta[chosen]
    return {
        "of_tokens": float(chosen.mean()),
        "sum": float(part.sum()),
        "share": float(np.abs(part).sum() / np.abs(delta).sum()),
        "of_falls": float(part.clip(max=0).sum() / delta.clip(max=0).sum()),
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By policy and learning rate: each seed's mean over its steps, and over seeds the mean with a 95% interval."""
    groups: dict[tuple[str, float], list[list[dict[str, Any]]]] = {}
    for run in runs:
        groups.setdefault((run["policy"], run["lr"]), []).append(run["found"])
    return [
        {
            "policy": policy,
            "lr": lr,
            "cells": {
                name: {
                    field: interval([float(np.mean([s["cells"][name][field] for s in states])) for states in of_seeds])
                    for field in of_seeds[0][0]["cells"][name]
                }
                for name in of_seeds[0][0]["cells"]
            },
            "ranks": {
                name: interval([float(np.mean([s["ranks"][name] for s in states])) for states in of_seeds])
                for name in of_seeds[0][0]["ranks"]
            },
            "concentration": {
                kind: [
                    interval([float(np.mean([s["concentration"][kind][k] for s in states])) for states in of_seeds])
                    for k in range(len(FRACTIONS))
                ]
                for kind in ("influence", "covariance")
            },
        }
        for (policy, lr), of_seeds in groups.items()
    ]


def markdown(report: Mapping[str, Any]) -> str:
    """A table over kinds of tokens; shares of what is large."""
    rows = report["summary"]
    titles = " | ".join(f"{row['policy']}, lr {row['lr']:g}" for row in rows)
    lines = [f"| tokens: share of them, of all influence, of all that lowers; sum in 1e-6 nats a step | {titles} |"]
    lines.append("|---|" + "---|" * len(rows))
    for name in rows[0]["cells"]:
        lines.append(f"| {name} | {' | '.join(_written(row['cells'][name]) for row in rows)} |")
    for name in rows[0]["ranks"]:
        cells = (shown(row["ranks"][name], "+.2f") for row in rows)
        lines.append(f"| Spearman of influence with minus {name} | {' | '.join(cells)} |")
    for kind in ("influence", "covariance"):
        for k, fraction in enumerate(FRACTIONS):
            cells = (_percent(row["concentration"][kind][k]) for row in rows)
            lines.append(f"| top {100 * fraction:g}% by size of {kind}, share of its sum | {' | '.join(cells)} |")
    return "\n".join(lines)


def _written(cell: Mapping[str, Any]) -> str:
    shares = ", ".join(_percent(cell[name]) for name in ("of_tokens", "share", "of_falls"))
    return f"{shares}; {shown(cell['sum'], '+.3g', 1e6)}"


def _percent(found: Mapping[str, float | None] | None) -> str:
    return f"{shown(found, '.0f', 100)}%"


def trainings(quick: bool) -> list[Training]:
    """All that is run."""
    if quick:
        return [Training("demo", 1e-4, seed, steps=(1,), prompts=4, evaluated=4) for seed in (0, 1)]
    return [Training(policy, lr, seed) for policy, lr in (("demo", 1e-4), ("early", 1e-4)) for seed in range(SEEDS)]


BENCHMARK = Benchmark(NAME, __doc__, trainings, train, summary, markdown)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
