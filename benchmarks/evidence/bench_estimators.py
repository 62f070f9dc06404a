"""Measure how many evaluation rollouts a ranking needs, and which estimator uses them best.

    python -m benchmarks estimators            writes results/estimators.json and its table in README.md;
                                               an hour on a core, resumed where it stopped
    python -m benchmarks estimators --quick    small and short, written nowhere, to check that it works

At states of GRPO training runs the gradient of the entropy is estimated from evaluation batches of many sizes, and the
resulting influences of 64 rollouts are compared with those of the exact gradient where all completions can be
enumerated ("toy"), else of 8,192 rollouts of other prompts. Every estimator but that of the share of the score term
costs a reverse pass over its rollouts. Squared errors are sums over rollouts, over the sum of the true influences'
squares. A user has error bars and not the truth: their coverage is measured, and the rule says up to which share of
noise, sum stderr_i^2 / sum delta_i^2, the tenth of the rollouts with the largest influences is identified, each with
its sign.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

import fx_influence as fx
from benchmarks.evidence.arithmetic import draw_prompts
from benchmarks.evidence.estimator_tables import FIELDS, appendix, markdown, summary
from benchmarks.evidence.training_runs import (
    Benchmark,
    Policy,
    StepState,
    all_completions,
    exact_entropy,
    initial_policy,
    selected_step_states,
)
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.autodiff.token_values import all_token_moments, all_token_values
from fx_influence.batching.rows import select_rows
from fx_influence.estimators.entropy import (
    TokenCoefficients,
    completion_values,
    entropy_coefficients,
)
from fx_influence.interop.rollouts.batch import collate
from fx_influence.objectives import surrogate_coefficients
from fx_influence.types import Batch, Gradients, Params, TokenValues

NAME = "bench_estimators"
SEEDS, MAX_NORM = 3, 1.0
TOP = 0.1
"""Share of the rollouts to be identified by their influences."""
MAX_ROLLOUTS = 4096
"""Rollouts that all draws of one size of E take, unless a single draw takes more."""
STRATIFIED, ARITHMETIC = "per_decision, stratified draw", "per_decision, arithmetic draw"


class WithErrorBars(Protocol):
    """Influences (n,) with their standard errors (n,)."""

    @property
    def per_sequence(self) -> Tensor: ...

    @property
    def stderr(self) -> Tensor: ...


class TrainingRun(NamedTuple):
    """A GRPO run that is measured before each of its ``steps``."""

    policy: str
    seed: int
    lr: float = 1e-4
    steps: tuple[int, ...] = (20,)
    sizes: tuple[int, ...] = (32, 64, 256, 1024)
    draws: int = 10
    asked: int = 2048
    true_prompts: int = 4096
    is_stored: bool = True

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.seed}"


def by_energy(values: TokenValues, batch: Batch, collision: Tensor) -> TokenCoefficients:
    """Return coefficients of ``per_decision`` centred by the other rows' mean, weighted by the energy of their scores.

    Among constants the variance of grad S (y - b) is least at E[|grad S|^2 y] / E[|grad S|^2]. With respect to the
    logits, where tokens are orthogonal, |grad S_<t|^2 = sum_{s<t} 1 - 2 pi(y_s) + sum_j pi_sj^2. Source: Li et al.
    2026, arXiv 2602.07078 (optimal token baseline).

    Args:
        values: (n, T).
        batch: (n, T).
        collision: (n, T), sum_j pi_j^2 of each token.
    """
    mask = batch.completion_mask
    done = completion_values(values, mask)
    pi, squares, ok = completion_values(TokenValues(values.logprobs.exp(), collision), mask)
    of_tokens = torch.where(ok, 1 - 2 * pi + squares, 0.0)
    energy = of_tokens.cumsum(-1) - of_tokens
    y = done.entropies - done.entropies.sum() / ok.sum() * ok
    others = energy.sum(0) - energy
    x = y - torch.where(others > 0, ((energy * y).sum(0) - energy * y) / others, y.mean(0))
    later = x.flip(-1).cumsum(-1).flip(-1) - x
    rank = (mask.long().cumsum(-1) - 1).clamp(min=0)
    weights = torch.where(mask, later.gather(-1, rank), 0.0)
    return TokenCoefficients(weights / mask.sum(), mask.double() / mask.sum())


Draw = Callable[[int, np.random.Generator], Tensor]
"""Function that draws the rows of an E of the given size from its source."""

OBJECTIVES: dict[str, fx.Entropy] = {
    "per_decision": fx.Entropy(),
    "sequence": fx.Entropy("sequence"),
    "per_decision, by prompt": fx.Entropy(baseline="prompt"),
    "per_decision, shrunk": fx.Entropy(baseline="shrunk"),
    "no score term": fx.Entropy(score=0.0),
    "half the score term, shrunk": fx.Entropy(baseline="shrunk", score=0.5),
    "estimated share of the score term, shrunk": fx.Entropy(baseline="shrunk", score="auto"),
}
ENERGY = "per_decision, by energy"
BARS = ("per_decision", "per_decision, shrunk", "no score term", "half the score term, shrunk")
"""Estimators whose error bars are compared with their errors, on a quarter of the draws."""


@contextmanager
def bias_is_measured() -> Iterator[None]:
    """Leave out the warning of a biased objective."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"objective\.score is", UserWarning)
        yield


def train(training: TrainingRun) -> list[dict[str, Any]]:
    """Return the errors of every estimator at every size, at each of the ``steps``."""
    policy = initial_policy(training.policy, training.is_stored)
    states = selected_step_states(policy, training.lr, training.seed, training.steps, 8, 8)
    return [{"step": step_state.step, "errors": measure(training, policy, step_state)} for step_state in states]


def measure(training: TrainingRun, policy: Policy, step_state: StepState) -> list[dict[str, Any]]:
    """Return means over draws of E: relative squared error, rank correlation, and the share of the top identified."""
    apply, params = fx.make_functional(copy.deepcopy(policy.model))
    state = fx.adamw_state(step_state.optimizer, policy.model)
    gradients = rollout_gradients(params, step_state.batch, apply)
    total_grad: Gradients = {name: g.sum(0) for name, g in gradients.items()}
    gain = fx.adamw_decompose(total_grad, state, params, max_grad_norm=MAX_NORM).gain
    directions = torch.cat([(gain[name] * g).flatten(1) for name, g in gradients.items()], 1)
    seed = step_state.rng.randrange(2**30)
    e_policy, truth_policy = split_held_out(training, policy)
    truth = directions @ true_gradient(training, truth_policy, params, apply, seed)
    # Many prompts with few completions each, or the reverse.
    largest, count = max(training.sizes), len(e_policy.held_out)
    pools = {
        each: e_policy.evaluation(prompts := min(count, largest // each), largest // prompts, seed + each)
        for each in (1, 2, 8)
    }
    variants: list[tuple[str, int, Batch, Draw]] = [
        (name, each, pool, partial(_draw_by_prompt, pool, each))
        for each, pool in pools.items()
        for name in (*OBJECTIVES, ENERGY)
        if each == 2 or name in ("per_decision", "per_decision, shrunk")
    ]
    if training.policy == "toy":
        every = collate(all_completions(policy), policy.tokenizer.pad_token_id)
        chances = all_token_values(params, every, apply).logprobs.sum(-1).exp()
        designs: dict[str, Callable[..., Tensor]] = {
            STRATIFIED: _stratified,
            ARITHMETIC: partial(_stratified, one_shift=True),
        }
        variants += [
            (name, each, every, partial(draw, chances, count, each))
            for name, draw in designs.items()
            for each in (2, 8)
        ]
    options: dict[str, Any] = {"apply": apply, "max_grad_norm": MAX_NORM, "per_token": False}
    errors = []
    for name, each, source, draw in variants:
        moments = all_token_moments(params, source, apply)
        objective = OBJECTIVES.get(name, fx.Entropy())
        for size in training.sizes:
            draws_of_size = max(2, min(training.draws, MAX_ROLLOUTS // size))
            figures, bars = [], []
            for k in range(draws_of_size):
                index = draw(size, np.random.default_rng([step_state.step, size, k]))
                e = select_rows(source, index)
                if objective.score == "auto" or (name in BARS and k < max(1, draws_of_size // 4)):
                    with bias_is_measured():
                        out = fx.influence(params, step_state.batch, e, state, objective=objective, **options)
                    bars.append(out)
                if objective.score == "auto":
                    figures.append(error_of(bars[-1].per_sequence, truth))
                    continue
                values = TokenValues(moments.logprobs[index], moments.entropies[index])
                if name == ENERGY:
                    weights = by_energy(values, e, moments.collision[index])
                else:
                    weights = surrogate_coefficients(objective, values, e)
                figures.append(error_of(directions @ _objective_grad(params, e, weights, apply), truth))
            means = {field: float(np.mean([draw[field] for draw in figures])) for field in FIELDS}
            if bars:
                means["noise_share"] = float(np.mean([noise_share(out) for out in bars]))
                means["coverage"] = float(np.mean([coverage(out, truth) for out in bars]))
            errors.append({"estimator": name, "rollouts": size, "each": each, **means})
    return errors


def coverage(out: fx.Influence, truth: Tensor) -> float:
    """Return the share of rollouts with a loss whose true influence is in its 95% interval, by Student's t."""
    assert out.degrees_of_freedom is not None
    half_width = fx.interval_half_width(out.stderr, out.degrees_of_freedom)
    return float(((out.per_sequence - truth).abs() <= half_width)[truth != 0].double().mean())


def noise_share(out: WithErrorBars) -> float:
    """Return the share of noise in the squared influences by their error bars: 0 without noise, 1 without signal."""
    return float((out.stderr**2).sum() / (out.per_sequence**2).sum())


def _stratified(
    chances: Tensor, prompts: int, each: int, size: int, rng: np.random.Generator, one_shift: bool = False
) -> Tensor:
    """Draw as ``_draw_by_prompt`` from all completions, one from each of equal strata of a prompt's distribution.

    Args:
        chances: (N,), probabilities of all completions of all prompts given theirs.
        prompts: number of prompts.
        each: rows per prompt, or more if there are not enough prompts.
        size: number of rows.
        rng: random state.
        one_shift: whether a prompt's rows share their place in the stratum, as in arithmetic sampling (Vilnis et al.
            2023, arXiv 2210.15458).
    """
    selected = rng.choice(prompts, min(size // each, prompts), replace=False)
    cumulative = chances.reshape(prompts, -1).cumsum(1).numpy()
    strata = size // len(selected)
    rows = []
    for p, c in zip(selected, cumulative[selected], strict=True):
        uniform = (np.arange(strata) + rng.random(1 if one_shift else strata)) / strata
        rows.append(p * len(c) + np.searchsorted(c, uniform * c[-1]))
    return torch.from_numpy(np.concatenate(rows))


def _draw_by_prompt(pool: Batch, each: int, size: int, rng: np.random.Generator) -> Tensor:
    """Draw ``size`` rows, ``each`` per prompt, or more per prompt if there are not enough prompts."""
    assert pool.group is not None
    groups = pool.group.numpy()
    labels = np.unique(groups)
    prompts = min(size // each, len(labels))
    selected = rng.choice(labels, prompts, replace=False)
    return torch.from_numpy(
        np.concatenate([rng.permutation(np.flatnonzero(groups == g))[: size // prompts] for g in selected])
    )


def _objective_grad(params: Params, batch: Batch, weights: TokenCoefficients, apply: fx.Policy) -> Tensor:
    """Return the flat gradient of the entropy's surrogate with these coefficients."""
    weighted = batch._replace(coefficients=weights.logprobs, entropy_coefficients=weights.entropies)
    grads = batch_gradient(params, weighted, apply)
    return -torch.cat(
        [torch.zeros_like(p).flatten() if (g := grads[name]) is None else g.flatten() for name, p in params.items()]
    )


def split_held_out(training: TrainingRun, policy: Policy) -> tuple[Policy, Policy]:
    """Return the policy with the held-out prompts of E, and with those of the truth: disjoint, except for toy."""
    if training.policy == "toy":
        return policy, policy
    taken = {prompt.text for prompt in policy.train}
    new = draw_prompts(random.Random(training.seed), training.asked + training.true_prompts, taken, "", policy.task)
    return policy._replace(held_out=new[: training.asked]), policy._replace(held_out=new[training.asked :])


def true_gradient(training: TrainingRun, policy: Policy, params: Params, apply: fx.Policy, seed: int) -> Tensor:
    """Return the flat gradient of the entropy: exact for toy, else from many other rollouts.

    Args:
        training: the run.
        policy: the policy before the step, with the prompts of the truth.
        params: its parameters by name.
        apply: its function.
        seed: of the sampling.
    """
    if training.policy == "toy":
        batch = collate(all_completions(policy), policy.tokenizer.pad_token_id)
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        grads = torch.autograd.grad(exact_entropy(fx.token_values(leaves, batch, apply), batch), list(leaves.values()))
        return torch.cat([g.flatten() for g in grads])
    e = policy.evaluation(len(policy.held_out), 2, seed)
    return _objective_grad(params, e, entropy_coefficients(all_token_values(params, e, apply), e), apply)


def error_of(estimate: Tensor, truth: Tensor) -> dict[str, float]:
    """Return the errors of influences (n,) that ``estimator_tables.FIELDS`` names."""
    k = max(1, round(TOP * len(truth)))
    largest = truth.abs().topk(k).indices
    identified = torch.isin(largest, estimate.abs().topk(k).indices)
    return {
        "squared_error": float(((estimate - truth) ** 2).sum() / (truth**2).sum()),
        "spearman": float(spearmanr(estimate.numpy(), truth.numpy()).statistic),
        "top": float((identified & (estimate[largest].sign() == truth[largest].sign())).double().mean()),
    }


def training_runs(quick: bool) -> list[TrainingRun]:
    """Return the training runs of the benchmark."""
    if quick:
        return [TrainingRun("toy", 0, steps=(1,), sizes=(16,), draws=2, is_stored=False)]
    toy = [TrainingRun("toy", seed, sizes=(16, 32, 64, 128, 256)) for seed in range(SEEDS)]
    return [*toy, *(TrainingRun(policy, seed) for policy in ("demo", "early") for seed in range(SEEDS))]


BENCHMARK = Benchmark(NAME, __doc__, training_runs, train, summary, markdown, appendix)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
