"""Does an influence foretell what leaving rollouts out does? The real step redone without each, and on random halves.

    python -m benchmarks counterfactual            writes results/counterfactual.json and EVIDENCE.md;
                                                   an hour on two cores, continued where it stopped
    python -m benchmarks counterfactual --quick    one small state, written nowhere: it only shows that this works

GRPO trainings are stopped at several steps. There AdamW's step, with clipping and second moment made anew, is redone
without each rollout and on random halves of U, in float64, and the entropy measured: exactly where all completions can
be listed ("toy"), else by importance sampling on fresh rollouts, the same for all steps, that the influences have not
seen. What is compared is rank correlation: with the effect of leaving one out (LOO), and with the entropy after half
the batch (linear datamodelling score, LDS, arXiv 2303.14186).
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor

import fx_influence as fx
from benchmarks.evidence.trainings import (
    Benchmark,
    Moment,
    Policy,
    every_completion,
    exact_entropy,
    moments_at,
    started,
)
from benchmarks.harness import interval, shown
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.perturbed_values import perturbed_token_values
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.estimators.entropy import entropy_coefficients
from fx_influence.interop.rollouts.batch import collate
from fx_influence.types import Batch, Params, Preconditioner, TokenValues

NAME = "bench_counterfactual"
MAX_NORM = 1.0
HALVES = 60
COMPLETIONS = 4
SEEDS = 5


class Training(NamedTuple):
    """One GRPO run that is stopped at ``steps`` for measuring."""

    policy: str
    lr: float
    seed: int
    steps: tuple[int, ...]
    prompts: int = 8
    evaluated: int = 512
    kept: bool = True

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.lr:g}-{self.seed}"


SIGNLESS = ("size of advantage", "gradient norm", "length")
"""What says how much and not whether up or down: compared with the size of the effect."""


def train(training: Training) -> list[dict[str, Any]]:
    """The run, and what is measured before each of its ``steps``."""
    policy = started(training.policy, training.kept)
    chosen = moments_at(policy, training.lr, training.seed, training.steps, training.prompts, COMPLETIONS)
    return [{"step": now.step, **measure(training, policy, now)} for now in chosen]


def measure(training: Training, policy: Policy, now: Moment) -> dict[str, Any]:
    """Correlations of every predictor with what happens, and the ceiling that the truth's own noise sets."""
    apply, params = fx.make_functional(copy.deepcopy(policy.model).double())
    state = fx.adamw_state(now.optimizer, policy.model)
    first, second = ({name: x.double() for name, x in tree.items()} for tree in (state.exp_avg, state.exp_avg_sq))
    state = state._replace(exp_avg=first, exp_avg_sq=second)
    seed, count = now.rng.randrange(2**30), min(training.evaluated // 2, len(policy.held_out))
    batch, e = now.batch, policy.evaluation(count, training.evaluated // count, seed)
    advantages = torch.tensor([r.advantage or 0.0 for r in now.rollouts])
    gradients = rollout_gradients(params, batch, apply)
    n = len(advantages)
    halves = torch.stack(
        [torch.zeros(n).index_fill(0, torch.tensor(now.rng.sample(range(n), n // 2)), 1.0) for _ in range(HALVES)]
    )
    subsets = torch.cat([1 - torch.eye(n), halves, torch.ones(1, n)]).double()
    change = (
        exact_change(policy, params, apply)
        if training.policy == "toy"
        else sampled_change(training, policy, params, apply, seed + 1)
    )

    def directions(some: Tensor) -> Params:
        made = [
            fx.adamw_decompose(
                {name: torch.tensordot(w, g, 1) for name, g in gradients.items()}, state, params, max_grad_norm=MAX_NORM
            ).direction
            for w in some
        ]
        return {name: training.lr * torch.stack([v[name] for v in made]) for name in params}

    changes = torch.cat([change(directions(some)) for some in subsets.split(8)])
    predicted = predictions(params, batch, e, state, apply, gradients, advantages)
    if training.policy == "toy":
        every = collate(every_completion(policy), policy.tokenizer.pad_token_id)
        options: dict[str, Any] = {"objective": entropy_of_all, "max_grad_norm": MAX_NORM, "stderr": False}
        predicted["share, exact"] = fx.influence(params, batch, every, state, apply=apply, **options).per_sequence
    return compared(changes, predicted, halves.double(), n)


def entropy_of_all(logprobs: Tensor, entropies: Tensor, every: Batch) -> Tensor:
    """The query whose gradient is that of ``exact_entropy``, without a draw."""
    before = exact_entropy(TokenValues(logprobs, entropies), every).detach()
    log_p, h, length = logprobs.sum(-1), entropies.sum(-1), every.completion_mask.sum(-1)
    p = log_p.detach().exp()
    return p * (log_p * (h.detach() - before * length) + h) / (p * length).sum()


def exact_change(policy: Policy, params: Params, apply: fx.Policy) -> Callable[[Params], Tensor]:
    """Delta H of a block of steps, (K, 1): a sum over all completions of all prompts."""
    every = collate(every_completion(policy), policy.tokenizer.pad_token_id)
    before = exact_entropy(all_token_values(params, every, apply), every)

    def change(block: Params) -> Tensor:
        return (exact_entropy(perturbed_token_values(params, block, 1.0, every, apply), every) - before).unsqueeze(1)

    return change


def sampled_change(
    training: Training, policy: Policy, params: Params, apply: fx.Policy, seed: int
) -> Callable[[Params], Tensor]:
    """The same by importance sampling on fresh rollouts, (K, prompts): what each prompt adds, by their number."""
    prompts = training.evaluated // 2
    sweep = fx.snis_sweep(params, policy.evaluation(prompts, 2, seed), apply=apply)

    def change(block: Params) -> Tensor:
        return prompts * sweep(block, [1.0]).contributions[0].unflatten(1, (prompts, 2)).sum(-1)

    return change


def predictions(
    params: Params,
    batch: Batch,
    e: Batch,
    state: fx.AdamWState,
    apply: fx.Policy,
    gradients: Params,
    advantages: Tensor,
) -> dict[str, Tensor]:
    """One number a rollout of what each predictor says that it adds to the entropy, (n,)."""
    gains = {
        key: fx.influence(
            params, batch, e, state, apply=apply, preconditioner=preconditioner, max_grad_norm=MAX_NORM, stderr=False
        ).per_sequence
        for key, preconditioner in PRECONDITIONERS.items()
    }
    values = all_token_values(params, e, apply)
    wanted = entropy_coefficients(values, e)
    weighted = e._replace(coefficients=wanted.logprobs, entropy_coefficients=wanted.entropies)
    # Plain gradient descent moves by -g_i, and what descends the surrogate is minus the entropy's gradient.
    descent = [(name, g) for name, g in batch_gradient(params, weighted, apply).items() if g is not None]
    logprobs = all_token_values(params, batch, apply).logprobs
    mask = batch.completion_mask
    a = advantages.unsqueeze(1).expand(mask.shape).double()
    proxy = (logprobs - logprobs[mask].mean()) * (a - a[mask].mean()) * mask
    return {
        **gains,
        "sgd": torch.stack([gradients[name].flatten(1) @ g.flatten() for name, g in descent]).sum(0),
        "covariance proxy": -proxy.sum(1),
        "advantage": -advantages,
        "size of advantage": advantages.abs(),
        "gradient norm": torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0),
        "length": mask.sum(1).double(),
    }


def compared(changes: Tensor, predicted: dict[str, Tensor], halves: Tensor, n: int) -> dict[str, Any]:
    """Spearman correlations with the effect of leaving one out, its size, and the entropy after half the batch."""
    effects = changes[-1] - changes[:n]
    after = changes[n:-1]
    effect, signed = effects.mean(1), {k: x for k, x in predicted.items() if k not in SIGNLESS}
    # Ranks are of differences: what moves all effects alike is neither effect nor error.
    between, prompts = effects - effects.mean(0), effects.shape[1]
    return {
        "rollouts": n,
        "delta_h": float(changes[-1].mean()),
        "effect": float(between.mean(1).square().mean().sqrt()),
        "effect_stderr": float((between.var(1) / prompts).mean().sqrt()) if prompts > 1 else 0.0,
        "loo": {k: _rank(x, effect) for k, x in signed.items()} | {"ceiling": _ceiling(effects)},
        "lds": {k: _rank(halves @ x.double(), after.mean(1)) for k, x in signed.items()} | {"ceiling": _ceiling(after)},
        "size": {k: _rank(x.abs(), effect.abs()) for k, x in predicted.items()},
    }


def _rank(a: Tensor, b: Tensor) -> float | None:
    if a.unique().numel() < 2 or b.unique().numel() < 2:
        return None
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def _ceiling(truth: Tensor) -> float:
    """The correlation that the truth itself would have with what is measured of it: the root of its reliability.

    From the two halves of the prompts.
    """
    if truth.shape[1] == 1:
        return 1.0
    r = _rank(truth[:, ::2].mean(1), truth[:, 1::2].mean(1)) or 0.0
    # Of the mean of two halves, Spearman 1910 and Brown 1910.
    return math.sqrt(max(0.0, 2 * r / (1 + r))) if r > -1 else 0.0


def trainings(quick: bool) -> list[Training]:
    """All that is run."""
    if quick:
        return [
            Training("toy", 1e-3, 0, (1,), evaluated=64, kept=False),
            Training("demo", 1e-4, 0, (1,), prompts=2, evaluated=16),
        ]
    steps = (1, 5, 20, 50, 100)
    return [
        *(Training("demo", lr, seed, steps) for lr in (1e-5, 1e-4, 1e-3) for seed in range(SEEDS)),
        *(Training("toy", lr, seed, steps) for lr in (1e-4, 1e-3) for seed in range(SEEDS)),
        *(Training("large", 1e-4, seed, (1, 20, 50), evaluated=256) for seed in range(SEEDS)),
    ]


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of every state, and of the first step and all later ones."""
    return {"states": of_states(runs), "phases": of_phases(runs)}


PHASES = {"step 1": range(1, 2), "later": range(2, 10**6)}
REGIMES = {"lr to 1e-4": (0.0, 1e-4), "lr 1e-3": (1e-4, 1.0)}
PRECONDITIONERS: dict[str, Preconditioner] = {"share": "frozen", "marginal": "jacobian", "rmsprop": "rmsprop"}
"""Preconditioners by the names of their predictors in stored results."""

CANDIDATES = ("share", "marginal", "sgd", "covariance proxy", "advantage")


def of_phases(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a training the mean over a phase's states, over trainings of all policies means with intervals.

    ``best``: the predictor with the highest mean, and those below it by no more than the interval of the difference.
    """
    found = []
    for regime, (above, to) in REGIMES.items():
        for phase, steps in PHASES.items():
            trained = [[s for s in run["found"] if s["step"] in steps] for run in runs if above < run["lr"] <= to]
            if not any(trained):
                continue
            row: dict[str, Any] = {"regime": regime, "phase": phase, "trainings": sum(map(bool, trained))}
            for kind in ("loo", "lds"):
                means = {name: _means(trained, kind, name) for name in (*CANDIDATES, "ceiling")}
                row[kind] = {name: interval(list(values.values())) for name, values in means.items()}
                row[kind]["best"] = _best({name: means[name] for name in CANDIDATES})
            found.append(row)
    return found


def _means(trained: Sequence[Sequence[dict[str, Any]]], kind: str, name: str) -> dict[int, float]:
    known = {k: [s[kind][name] for s in states if s[kind][name] is not None] for k, states in enumerate(trained)}
    return {k: statistics.fmean(values) for k, values in known.items() if values}


def _best(means: dict[str, dict[int, float]]) -> list[str]:
    known = {name: values for name, values in means.items() if values}
    first = max(known, key=lambda name: statistics.fmean(known[name].values()))
    best = [first]
    for name in known.keys() - {first}:
        below = [x - known[name][k] for k, x in known[first].items() if k in known[name]]
        gap = interval(below)
        if gap is None or gap["mean"] is None or gap["half_width"] is None or gap["mean"] <= gap["half_width"]:
            best.append(name)
    return sorted(best, key=list(CANDIDATES).index)


def of_states(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds with 95% intervals, by policy, learning rate and step."""
    groups: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for run in runs:
        for state in run["found"]:
            groups.setdefault((run["policy"], run["lr"], state["step"]), []).append(state)
    return [
        {
            "policy": policy,
            "lr": lr,
            "step": step,
            "seeds": len(states),
            **{name: interval([s[name] for s in states]) for name in ("delta_h", "effect", "effect_stderr")},
            **{
                kind: {
                    name: interval([s[kind][name] for s in states if s[kind][name] is not None])
                    for name in states[0][kind]
                }
                for kind in KINDS
            },
            # Of the same states, so that what is common to both does not blur it.
            **{f"share_less_sgd_{kind}": interval(_differences(states, kind)) for kind in ("loo", "lds")},
        }
        for (policy, lr, step), states in sorted(groups.items(), key=lambda item: item[0])
    ]


def _differences(states: Sequence[dict[str, Any]], kind: str) -> list[float]:
    pairs = [(s[kind]["share"], s[kind]["sgd"]) for s in states]
    return [share - sgd for share, sgd in pairs if share is not None and sgd is not None]


KINDS = {"loo": "leaving one out", "lds": "half the batch", "size": "size of leaving one out"}
SIGNED = ("share", "share, exact", "marginal", "sgd", "covariance proxy", "advantage", "ceiling")
SHOWN = {"loo": SIGNED, "lds": SIGNED, "size": (*SIGNED[:5], *SIGNLESS)}


def markdown(report: dict[str, Any]) -> str:
    """What is best in which phase; and for each kind of truth a table by policy, learning rate and step."""
    tables = [advice(report)]
    states = report["summary"]["states"]
    for kind, title in KINDS.items():
        names = [name for name in SHOWN[kind] if any(name in row[kind] for row in states)]
        lines = [f"| {title}: policy, lr, step | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        for row in states:
            cells = (shown(row[kind].get(name), "+.2f") for name in names)
            lines.append(f"| {row['policy']}, {row['lr']:g}, {row['step']} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def advice(report: dict[str, Any]) -> str:
    """At the first step and later: rank correlations, and which predictors to use."""
    lines = [
        "| steps | truth | share | marginal | plain SGD | covariance proxy | advantage | ceiling | use |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["summary"]["phases"]:
        for kind in ("loo", "lds"):
            cells = (shown(row[kind][name], "+.2f") for name in (*CANDIDATES, "ceiling"))
            use = ", ".join(row[kind]["best"]).replace("sgd", "plain SGD")
            which = f"{row['phase']}, {row['regime']} ({row['trainings']} trainings)"
            lines.append(f"| {which} | {KINDS[kind]} | {' | '.join(cells)} | {use} |")
    return "\n".join(lines)


BENCHMARK = Benchmark(NAME, __doc__, trainings, train, summary, markdown, readme=advice)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
