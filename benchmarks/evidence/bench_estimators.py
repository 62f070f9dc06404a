"""Measure how many evaluation rollouts a ranking needs, and which estimator uses them best.

    python -m benchmarks estimators            writes results/estimators.json and its table in README.md;
                                               ten minutes on two cores, resumed where it stopped
    python -m benchmarks estimators --quick    small and short, written nowhere, to check that it works

At states of GRPO training runs the gradient of the entropy is estimated from evaluation batches of many sizes, and the
resulting influences of 64 rollouts are compared with those of the exact gradient where all completions can be
enumerated ("toy"), else of 16,384 rollouts of other prompts. Every estimator costs a reverse pass over its rollouts.
Squared errors are sums over rollouts, over the sum of the true influences' squares. A user has error bars and not the
truth: the rule says up to which share of noise, sum stderr_i^2 / sum delta_i^2, the tenth of the rollouts with the
largest influences is identified, each with its sign.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.batching.rows import select_rows
from fx_influence.estimators.entropy import (
    TokenCoefficients,
    centred_entropies,
    completion_values,
    entropy_coefficients,
)
from fx_influence.interop.rollouts.batch import collate
from fx_influence.types import Batch, Gradients, Params, TokenValues

NAME = "bench_estimators"
SEEDS, MAX_NORM = 5, 1.0
TOP = 0.1
"""Share of the rollouts to be identified by their influences."""
MAX_ROLLOUTS = 8192
"""Rollouts that all draws of one size of E take, unless a single draw takes more."""
STRATIFIED = "per_decision, stratified draw"


class TrainingRun(NamedTuple):
    """A GRPO run that is measured before each of its ``steps``."""

    policy: str
    seed: int
    lr: float = 1e-4
    steps: tuple[int, ...] = (20,)
    sizes: tuple[int, ...] = (64, 256, 1024, 4096)
    draws: int = 10
    asked: int = 2048
    true_prompts: int = 8192
    is_stored: bool = True

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.seed}"


def by_prompt(values: TokenValues, batch: Batch) -> TokenCoefficients:
    """Return coefficients of ``per_decision`` centred by prompt, which removes the variance between prompts.

    The baseline of a completion is the mean over the prompt's other completions, which it is independent of.
    """
    done = completion_values(values, batch.completion_mask)
    x = centred_entropies(done, "per_decision", "token", done)
    group = torch.unique(batch.group, return_inverse=True)[1] if batch.group is not None else torch.arange(len(x))
    sums = torch.zeros(int(group.max()) + 1, x.shape[1], dtype=x.dtype).index_add(0, group, x)
    others = torch.bincount(group).to(x)[group].unsqueeze(1) - 1
    x = torch.where(others > 0, x - (sums[group] - x) / others.clamp(min=1), x)
    later = x.flip(-1).cumsum(-1).flip(-1) - x
    mask, z = batch.completion_mask, batch.completion_mask.sum()
    rank = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return TokenCoefficients(torch.where(mask, later.gather(-1, rank), 0.0) / z, mask.double() / z)


def without_score_term(values: TokenValues, batch: Batch) -> TokenCoefficients:
    """Return coefficients without the score term: only the entropies of tokens change, not which texts are sampled."""
    coefficients = entropy_coefficients(values, batch)
    return coefficients._replace(logprobs=torch.zeros_like(coefficients.logprobs))


Draw = Callable[[int, np.random.Generator], Tensor]
"""Function that draws the rows of an E of the given size from its source."""

ESTIMATORS: dict[str, Callable[[TokenValues, Batch], TokenCoefficients]] = {
    "per_decision": entropy_coefficients,
    "sequence": lambda values, batch: entropy_coefficients(values, batch, "sequence"),
    "per_decision, by prompt": by_prompt,
    "no score term": without_score_term,
}


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
        for each in (2, 8)
    }
    variants: list[tuple[str, int, Batch, Draw]] = [
        (name, each, pool, partial(_draw_by_prompt, pool, each))
        for each, pool in pools.items()
        for name in ESTIMATORS
        if each == 2 or name.startswith("per_decision")
    ]
    if training.policy == "toy":
        every = collate(all_completions(policy), policy.tokenizer.pad_token_id)
        chances = all_token_values(params, every, apply).logprobs.sum(-1).exp()
        variants += [(STRATIFIED, each, every, partial(_stratified, chances, count, each)) for each in pools]
    errors = []
    for name, each, source, draw in variants:
        values = all_token_values(params, source, apply)
        for size in training.sizes:
            draws = max(2, min(training.draws, MAX_ROLLOUTS // size))
            indices = [draw(size, np.random.default_rng([step_state.step, size, k])) for k in range(draws)]
            figures = []
            for index in indices:
                e = select_rows(source, index)
                weights = ESTIMATORS.get(name, entropy_coefficients)(TokenValues(*(v[index] for v in values)), e)
                figures.append(_compare(directions @ _objective_grad(params, e, weights, apply), truth))
            means = {field: float(np.mean([draw[field] for draw in figures])) for field in FIELDS}
            if name == "per_decision":
                options: dict[str, Any] = {"apply": apply, "max_grad_norm": MAX_NORM, "per_token": False}
                batches = [select_rows(source, index) for index in indices[: max(1, draws // 4)]]
                bars = [fx.influence(params, step_state.batch, e, state, **options) for e in batches]
                means["noise_share"] = float(np.mean([noise_share(out) for out in bars]))
            errors.append({"estimator": name, "rollouts": size, "each": each, **means})
    return errors


def noise_share(out: fx.Influence) -> float:
    """Return the share of noise in the squared influences by their error bars: 0 without noise, 1 without signal."""
    return float((out.stderr**2).sum() / (out.per_sequence**2).sum())


def _stratified(chances: Tensor, prompts: int, each: int, size: int, rng: np.random.Generator) -> Tensor:
    """Draw as ``_draw_by_prompt`` from all completions, one from each of equal strata of a prompt's distribution."""
    selected = rng.choice(prompts, min(size // each, prompts), replace=False)
    cumulative = chances.reshape(prompts, -1).cumsum(1).numpy()
    strata = size // len(selected)
    rows = []
    for p, c in zip(selected, cumulative[selected], strict=True):
        uniform = (np.arange(strata) + rng.random(strata)) / strata
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


def _compare(estimate: Tensor, truth: Tensor) -> dict[str, float]:
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
    return [*toy, *(TrainingRun("demo", seed) for seed in range(SEEDS))]


BENCHMARK = Benchmark(NAME, __doc__, training_runs, train, summary, markdown, appendix)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
