"""Do influences predict the effect of leaving rollouts out? The real step redone without each, and on random halves.

    python -m benchmarks counterfactual            writes results/counterfactual.json and its tables in README.md;
                                                   an hour on two cores, resumed where it stopped
    python -m benchmarks counterfactual --quick    one small state, written nowhere, to check that it works

GRPO training runs are measured at several steps. There AdamW's step, with clipping and second moment recomputed, is
redone without each rollout and on random halves of U, in float64, and the entropy measured: exactly where all
completions can be enumerated ("toy"), else by importance sampling on fresh rollouts, the same for all steps, which the
influences have not used. Predictors are compared by rank correlation: with the effect of leaving one out (LOO), and
with the entropy after half
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
from benchmarks.evidence.training_runs import (
    Benchmark,
    Policy,
    StepState,
    all_completions,
    exact_entropy,
    initial_policy,
    selected_step_states,
)
from benchmarks.harness import format_interval, mean_interval
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


class TrainingRun(NamedTuple):
    """A GRPO run that is measured before each of its ``steps``."""

    policy: str
    lr: float
    seed: int
    steps: tuple[int, ...]
    prompts: int = 8
    evaluated: int = 512
    is_stored: bool = True

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.lr:g}-{self.seed}"


SIGNLESS = ("size of advantage", "gradient norm", "length")
"""Predictors of the size of an effect without its sign."""


def train(training: TrainingRun) -> list[dict[str, Any]]:
    """Make the run and return the measurements before each of its ``steps``."""
    policy = initial_policy(training.policy, training.is_stored)
    states = selected_step_states(policy, training.lr, training.seed, training.steps, training.prompts, COMPLETIONS)
    return [{"step": step_state.step, **measure(training, policy, step_state)} for step_state in states]


def measure(training: TrainingRun, policy: Policy, step_state: StepState) -> dict[str, Any]:
    """Return correlations of every predictor with the measured effects, and the ceiling set by the noise of these."""
    apply, params = fx.make_functional(copy.deepcopy(policy.model).double())
    state = fx.adamw_state(step_state.optimizer, policy.model)
    first, second = ({name: x.double() for name, x in tree.items()} for tree in (state.exp_avg, state.exp_avg_sq))
    state = state._replace(exp_avg=first, exp_avg_sq=second)
    seed, count = step_state.rng.randrange(2**30), min(training.evaluated // 2, len(policy.held_out))
    batch, e = step_state.batch, policy.evaluation(count, training.evaluated // count, seed)
    advantages = torch.tensor([r.advantage or 0.0 for r in step_state.rollouts])
    gradients = rollout_gradients(params, batch, apply)
    n = len(advantages)
    halves = torch.stack(
        [
            torch.zeros(n).index_fill(0, torch.tensor(step_state.rng.sample(range(n), n // 2)), 1.0)
            for _ in range(HALVES)
        ]
    )
    subsets = torch.cat([1 - torch.eye(n), halves, torch.ones(1, n)]).double()
    change = (
        exact_change(policy, params, apply)
        if training.policy == "toy"
        else sampled_change(training, policy, params, apply, seed + 1)
    )

    def directions(weights: Tensor) -> Params:
        steps = [
            fx.adamw_decompose(
                {name: torch.tensordot(w, g, 1) for name, g in gradients.items()}, state, params, max_grad_norm=MAX_NORM
            ).direction
            for w in weights
        ]
        return {name: training.lr * torch.stack([v[name] for v in steps]) for name in params}

    changes = torch.cat([change(directions(weights)) for weights in subsets.split(8)])
    predicted = predictions(params, batch, e, state, apply, gradients, advantages)
    if training.policy == "toy":
        every = collate(all_completions(policy), policy.tokenizer.pad_token_id)
        options: dict[str, Any] = {"objective": entropy_of_all, "max_grad_norm": MAX_NORM, "stderr": False}
        predicted["share, exact"] = fx.influence(params, batch, every, state, apply=apply, **options).per_sequence
    return compared(changes, predicted, halves.double(), n)


def entropy_of_all(logprobs: Tensor, entropies: Tensor, every: Batch) -> Tensor:
    """Return the objective whose gradient is that of ``exact_entropy``, without sampling error."""
    before = exact_entropy(TokenValues(logprobs, entropies), every).detach()
    log_p, h, length = logprobs.sum(-1), entropies.sum(-1), every.completion_mask.sum(-1)
    p = log_p.detach().exp()
    return p * (log_p * (h.detach() - before * length) + h) / (p * length).sum()


def exact_change(policy: Policy, params: Params, apply: fx.Policy) -> Callable[[Params], Tensor]:
    """Return the function that gives Delta H of a block of steps, (K, 1), by a sum over all completions."""
    every = collate(all_completions(policy), policy.tokenizer.pad_token_id)
    before = exact_entropy(all_token_values(params, every, apply), every)

    def change(block: Params) -> Tensor:
        return (exact_entropy(perturbed_token_values(params, block, 1.0, every, apply), every) - before).unsqueeze(1)

    return change


def sampled_change(
    training: TrainingRun, policy: Policy, params: Params, apply: fx.Policy, seed: int
) -> Callable[[Params], Tensor]:
    """Return the same by importance sampling on fresh rollouts, (K, prompts): contributions of prompts."""
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
    """Return each predictor's estimate of the entropy that every rollout adds, (n,)."""
    influences = {
        key: fx.influence(
            params, batch, e, state, apply=apply, preconditioner=preconditioner, max_grad_norm=MAX_NORM, stderr=False
        ).per_sequence
        for key, preconditioner in PRECONDITIONERS.items()
    }
    values = all_token_values(params, e, apply)
    weights = entropy_coefficients(values, e)
    weighted = e._replace(coefficients=weights.logprobs, entropy_coefficients=weights.entropies)
    # SGD moves by -g_i, and a batch gradient is that of minus the weighted sum, so both signs cancel.
    descent = [(name, g) for name, g in batch_gradient(params, weighted, apply).items() if g is not None]
    logprobs = all_token_values(params, batch, apply).logprobs
    mask = batch.completion_mask
    a = advantages.unsqueeze(1).expand(mask.shape).double()
    proxy = (logprobs - logprobs[mask].mean()) * (a - a[mask].mean()) * mask
    return {
        **influences,
        "sgd": torch.stack([gradients[name].flatten(1) @ g.flatten() for name, g in descent]).sum(0),
        "covariance proxy": -proxy.sum(1),
        "advantage": -advantages,
        "size of advantage": advantages.abs(),
        "gradient norm": torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0),
        "length": mask.sum(1).double(),
    }


def compared(changes: Tensor, predicted: dict[str, Tensor], halves: Tensor, n: int) -> dict[str, Any]:
    """Return rank correlations with the effect of leaving one out, its size, and the entropy after half the batch."""
    effects = changes[-1] - changes[:n]
    after = changes[n:-1]
    effect, signed = effects.mean(1), {k: x for k, x in predicted.items() if k not in SIGNLESS}
    # Only differences affect ranks, so what is common to all effects is subtracted.
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
    """Return the correlation of the true effects with their measurement: the root of its reliability.

    It is estimated from the two halves of the prompts.
    """
    if truth.shape[1] == 1:
        return 1.0
    r = _rank(truth[:, ::2].mean(1), truth[:, 1::2].mean(1)) or 0.0
    # Spearman-Brown formula (1910) for the mean of two halves.
    return math.sqrt(max(0.0, 2 * r / (1 + r))) if r > -1 else 0.0


def training_runs(quick: bool) -> list[TrainingRun]:
    """Return the training runs of the benchmark."""
    if quick:
        return [
            TrainingRun("toy", 1e-3, 0, (1,), evaluated=64, is_stored=False),
            TrainingRun("demo", 1e-4, 0, (1,), prompts=2, evaluated=16),
        ]
    steps = (1, 5, 20, 50, 100)
    return [
        *(TrainingRun("demo", lr, seed, steps) for lr in (1e-5, 1e-4, 1e-3) for seed in range(SEEDS)),
        *(TrainingRun("toy", lr, seed, steps) for lr in (1e-4, 1e-3) for seed in range(SEEDS)),
        *(TrainingRun("large", 1e-4, seed, (1, 20, 50), evaluated=256) for seed in range(SEEDS)),
    ]


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return figures of every state, and of the first step and of all later ones."""
    return {"states": of_states(runs), "phases": of_phases(runs)}


PHASES = {"step 1": range(1, 2), "later": range(2, 10**6)}
REGIMES = {"lr to 1e-4": (0.0, 1e-4), "lr 1e-3": (1e-4, 1.0)}
PRECONDITIONERS: dict[str, Preconditioner] = {"share": "frozen", "marginal": "jacobian", "rmsprop": "rmsprop"}
"""Preconditioners by the names of their predictors in stored results."""

CANDIDATES = ("share", "marginal", "sgd", "covariance proxy", "advantage")


def of_phases(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means with intervals over training runs of all policies, of each run's mean over the states of a phase.

    ``best``: the predictor with the highest mean, and those below it by no more than the interval of the difference.
    """
    rows = []
    for regime, (above, to) in REGIMES.items():
        for phase, steps in PHASES.items():
            runs_states = [[s for s in run["found"] if s["step"] in steps] for run in runs if above < run["lr"] <= to]
            if not any(runs_states):
                continue
            row: dict[str, Any] = {"regime": regime, "phase": phase, "trainings": sum(map(bool, runs_states))}
            for kind in ("loo", "lds"):
                means = {name: _means(runs_states, kind, name) for name in (*CANDIDATES, "ceiling")}
                row[kind] = {name: mean_interval(list(values.values())) for name, values in means.items()}
                row[kind]["best"] = _best({name: means[name] for name in CANDIDATES})
            rows.append(row)
    return rows


def _means(runs_states: Sequence[Sequence[dict[str, Any]]], kind: str, name: str) -> dict[int, float]:
    by_run = {k: [s[kind][name] for s in states if s[kind][name] is not None] for k, states in enumerate(runs_states)}
    return {k: statistics.fmean(values) for k, values in by_run.items() if values}


def _best(means: dict[str, dict[int, float]]) -> list[str]:
    defined = {name: values for name, values in means.items() if values}
    first = max(defined, key=lambda name: statistics.fmean(defined[name].values()))
    best = [first]
    for name in defined.keys() - {first}:
        differences = [x - defined[name][k] for k, x in defined[first].items() if k in defined[name]]
        gap = mean_interval(differences)
        if gap is None or gap["mean"] is None or gap["half_width"] is None or gap["mean"] <= gap["half_width"]:
            best.append(name)
    return sorted(best, key=list(CANDIDATES).index)


def of_states(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means over seeds with 95% intervals, by policy, learning rate and step."""
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
            **{name: mean_interval([s[name] for s in states]) for name in ("delta_h", "effect", "effect_stderr")},
            **{
                kind: {
                    name: mean_interval([s[kind][name] for s in states if s[kind][name] is not None])
                    for name in states[0][kind]
                }
                for kind in KINDS
            },
            # Differences by state, so that what is common to both predictors cancels.
            **{f"share_less_sgd_{kind}": mean_interval(_differences(states, kind)) for kind in ("loo", "lds")},
        }
        for (policy, lr, step), states in sorted(groups.items(), key=lambda item: item[0])
    ]


def _differences(states: Sequence[dict[str, Any]], kind: str) -> list[float]:
    pairs = [(s[kind]["share"], s[kind]["sgd"]) for s in states]
    return [share - sgd for share, sgd in pairs if share is not None and sgd is not None]


KINDS = {"loo": "leaving one out", "lds": "half the batch", "size": "size of leaving one out"}
LABELS = {"share": "frozen", "share, exact": "frozen, exact", "marginal": "jacobian", "sgd": "plain SGD"}
"""Titles of predictors by their names in stored results."""
SIGNED = ("share", "share, exact", "marginal", "sgd", "covariance proxy", "advantage", "ceiling")
COLUMNS = {"loo": SIGNED, "lds": SIGNED, "size": (*SIGNED[:5], *SIGNLESS)}


def appendix(report: dict[str, Any]) -> str:
    """Return for each kind of effect a table by policy, learning rate and step."""
    tables = []
    states = report["summary"]["states"]
    for kind, title in KINDS.items():
        names = [name for name in COLUMNS[kind] if any(name in row[kind] for row in states)]
        lines = [
            f"| {title}: policy, lr, step | {' | '.join(LABELS.get(n, n) for n in names)} |",
            "|---|" + "---|" * len(names),
        ]
        for row in states:
            cells = (format_interval(row[kind].get(name), "+.2f") for name in names)
            lines.append(f"| {row['policy']}, {row['lr']:g}, {row['step']} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def markdown(report: dict[str, Any]) -> str:
    """Return rank correlations at the first step and later, and the predictors to use."""
    lines = [
        "| steps | effect of | frozen | jacobian | plain SGD | covariance proxy | advantage | ceiling | use |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["summary"]["phases"]:
        for kind in ("loo", "lds"):
            cells = (format_interval(row[kind][name], "+.2f") for name in (*CANDIDATES, "ceiling"))
            use = ", ".join(LABELS.get(name, name) for name in row[kind]["best"])
            title = f"{row['phase']}, {row['regime']} ({row['trainings']} training runs)"
            lines.append(f"| {title} | {KINDS[kind]} | {' | '.join(cells)} | {use} |")
    return "\n".join(lines)


BENCHMARK = Benchmark(NAME, __doc__, training_runs, train, summary, markdown, appendix)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
