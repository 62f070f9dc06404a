"""Do influences predict the effect of leaving rollouts out? The real step redone without each, and on random halves.

    python -m benchmarks counterfactual            writes results/counterfactual.json and its tables in README.md;
                                                   45 minutes on two cores, resumed where it stopped
    python -m benchmarks counterfactual --quick    one small state, written nowhere, to check that it works

GRPO training runs are measured at several steps. At each, AdamW's step, with clipping and second moment recomputed, is
redone without each rollout and on random halves of U, in float64, and the entropy measured: exactly where all
completions can be enumerated ("toy"), else by importance sampling on fresh rollouts, the same for all steps, which the
influences have not used. Predictors are compared by rank correlation: with the effect of leaving one out (LOO), and
with the entropy after half the batch (linear datamodelling score, LDS, arXiv 2303.14186).
"""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor

import fx_influence as fx
from benchmarks.evidence.counterfactual_tables import SIGNLESS, appendix, markdown, summary
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
from fx_influence.autodiff.perturbed_values import perturbed_token_values
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.estimators.entropy import entropy_coefficients
from fx_influence.interop.rollouts.batch import collate
from fx_influence.types import Batch, Params, TokenValues

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


INFLUENCES: dict[str, dict[str, Any]] = {
    "share": {"preconditioner": "frozen"},
    "marginal": {"preconditioner": "jacobian"},
    "rmsprop": {"preconditioner": "rmsprop"},
    "share, clip": {"preconditioner": "frozen", "clip": "differentiated"},
    "marginal, clip": {"preconditioner": "jacobian", "clip": "differentiated"},
}
"""Options of ``fx.influence`` by the names of their predictors in stored results."""


class Step(NamedTuple):
    """A step of AdamW to be redone without rollouts.

    Attributes:
        params: parameters before the step, by name.
        apply: the policy.
        state: the optimizer's state before the step.
        batch: U, with the coefficients of its loss.
        advantages: (n,).
        gradients: of the loss of each rollout, (n, ...) by name.
    """

    params: Params
    apply: fx.Policy
    state: fx.AdamWState
    batch: Batch
    advantages: Tensor
    gradients: Params

    def redone(self, weights: Tensor) -> Params:
        """Return the steps (K, ...) by name with the rollouts' losses multiplied by ``weights``, (K, n)."""
        steps = [
            fx.adamw_decompose(
                {name: torch.tensordot(w.to(g.dtype), g, 1) for name, g in self.gradients.items()},
                self.state,
                self.params,
                max_grad_norm=MAX_NORM,
            ).direction
            for w in weights
        ]
        return {name: self.state.lr * torch.stack([v[name] for v in steps]) for name in self.params}


def random_halves(rng: random.Random, n: int, count: int) -> Tensor:
    """Return 1 for the rollouts in each of ``count`` random halves of ``n``, (count, n), float64."""
    chosen = [torch.tensor(rng.sample(range(n), n // 2)) for _ in range(count)]
    return torch.stack([torch.zeros(n, dtype=torch.float64).index_fill(0, half, 1.0) for half in chosen])


def weights_of_steps(halves: Tensor) -> Tensor:
    """Return the weights of rollouts in the steps without each, on the halves (count, n), and on all of them."""
    n = halves.shape[1]
    return torch.cat([1 - torch.eye(n, dtype=halves.dtype), halves, torch.ones(1, n, dtype=halves.dtype)])


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
    step = Step(params, apply, state, batch, advantages, rollout_gradients(params, batch, apply))
    halves = random_halves(step_state.rng, len(advantages), HALVES)
    change = (
        exact_change(policy, params, apply)
        if training.policy == "toy"
        else sampled_change(params, policy.evaluation(training.evaluated // 2, 2, seed + 1), apply)
    )
    changes = torch.cat([change(step.redone(weights)) for weights in weights_of_steps(halves).split(8)])
    predicted = predictions(step, e)
    if training.policy == "toy":
        every = collate(all_completions(policy), policy.tokenizer.pad_token_id)
        options: dict[str, Any] = {"objective": entropy_of_all, "max_grad_norm": MAX_NORM, "stderr": False}
        predicted["share, exact"] = fx.influence(params, batch, every, state, apply=apply, **options).per_sequence
    return compared(changes, predicted, halves)


def entropy_of_all(logprobs: Tensor, entropies: Tensor, every: Batch) -> Tensor:
    """Return s_a of an objective over all completions, whose gradient is the gradient of ``exact_entropy``."""
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


def sampled_change(params: Params, e: Batch, apply: fx.Policy) -> Callable[[Params], Tensor]:
    """Return the function that estimates Delta H of a block of steps by importance sampling.

    Args:
        params: parameters before the steps, by name.
        e: rollouts of the policy before the steps, an even number of each prompt.
        apply: the policy.

    Returns:
        Function of steps by name, (K, ...), to contributions of pairs of a prompt's rollouts, (K, pairs), whose mean is
        Delta H.
    """
    pairs, sweep = len(e.input_ids) // 2, fx.snis_sweep(params, e, apply=apply)

    def change(block: Params) -> Tensor:
        return pairs * sweep(block, [1.0]).contributions[0].unflatten(1, (pairs, 2)).sum(-1)

    return change


def predictions(step: Step, e: Batch, chosen: Collection[str] = INFLUENCES.keys()) -> dict[str, Tensor]:
    """Return each predictor's estimate of the entropy that every rollout of a step adds, (n,), by ``e``.

    Args:
        step: the step.
        e: rollouts of the policy before it.
        chosen: which of ``INFLUENCES``; a gradient over ``e`` each.
    """
    params, apply, state, batch, advantages, gradients = step
    shared: dict[str, Any] = {"apply": apply, "max_grad_norm": MAX_NORM, "stderr": False}
    influences = {
        key: fx.influence(params, batch, e, state, **shared, **options).per_sequence
        for key, options in INFLUENCES.items()
        if key in chosen
    }
    values = all_token_values(params, e, apply)
    weights = entropy_coefficients(values, e)
    weighted = e._replace(coefficients=weights.logprobs, entropy_coefficients=weights.entropies)
    # SGD moves by -g_i and ``batch_gradient`` differentiates minus the weighted sum, so the two signs cancel.
    descent = [(name, g) for name, g in batch_gradient(params, weighted, apply).items() if g is not None]
    return {
        **influences,
        "sgd": torch.stack([gradients[name].flatten(1) @ g.flatten() for name, g in descent]).sum(0),
        **proxies(fx.proxies.token_moments(params, batch, apply=apply), batch, advantages.double()),
        "advantage": -advantages,
        "size of advantage": advantages.abs(),
        "gradient norm": torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0),
        "length": batch.completion_mask.sum(1).double(),
    }


def proxies(moments: fx.TokenMoments, batch: Batch, advantages: Tensor) -> dict[str, Tensor]:
    """Return the field's proxies by name, those of tokens added up over each rollout, (n,).

    Relative surprisal r has no sign, so that its predictor is the sum of A (r - 1), which changes sign where r does.
    """
    c, mask, group = batch.coefficients, batch.completion_mask, batch.group
    assert c is not None
    assert group is not None
    above_mean = torch.where(mask, fx.proxies.relative_surprisal(moments, mask) - 1, 0.0)
    return {
        "covariance proxy": fx.proxies.covariance(moments, advantages, mask).sum(1),
        "exact tabular": fx.proxies.exact_tabular(moments, c, mask).sum(1),
        "STEER": fx.proxies.steer(moments, c, mask).sum(1),
        "REPO": fx.proxies.repo(moments, advantages, mask).sum(1),
        "relative surprisal": advantages * above_mean.sum(1),
        "GRPODropout": fx.proxies.grpo_dropout(moments, advantages, mask, group),
    }


def compared(changes: Tensor, predicted: dict[str, Tensor], halves: Tensor) -> dict[str, Any]:
    """Return rank correlations with the effect of leaving one out, its size, and the entropy after half the batch.

    Args:
        changes: Delta H of the steps with ``weights_of_steps``, contributions by prompt, (n + count + 1, prompts).
        predicted: the estimates (n,) by predictor.
        halves: 1 for the rollouts in a half, (count, n).
    """
    n = halves.shape[1]
    effects = changes[-1] - changes[:n]
    after = changes[n:-1]
    effect, signed = effects.mean(1), {k: x for k, x in predicted.items() if k not in SIGNLESS}
    # Only differences affect ranks, so the mean effect is subtracted.
    between = effects - effects.mean(0)
    return {
        "rollouts": n,
        "delta_h": float(changes[-1].mean()),
        "effect": float(between.mean(1).square().mean().sqrt()),
        "effect_stderr": stderr_of_mean(between),
        "loo": {k: rank_correlation(x, effect) for k, x in signed.items()} | {"ceiling": ceiling(effects)},
        "lds": {k: rank_correlation(halves @ x.double(), after.mean(1)) for k, x in signed.items()}
        | {"ceiling": ceiling(after)},
        "size": {k: rank_correlation(x.abs(), effect.abs()) for k, x in predicted.items()},
    }


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Return Spearman's rank correlation, None where either has one value alone."""
    if a.unique().numel() < 2 or b.unique().numel() < 2:
        return None
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def stderr_of_mean(effects: Tensor) -> float:
    """Return the root mean square of the standard errors of the effects' means over columns; 0 for one column."""
    columns = effects.shape[1]
    return float((effects.var(1) / columns).mean().sqrt()) if columns > 1 else 0.0


def ceiling(truth: Tensor) -> float:
    """Return the correlation of the true effects with their measurement: the root of its reliability.

    It is estimated from the two halves of the prompts.
    """
    if truth.shape[1] == 1:
        return 1.0
    r = rank_correlation(truth[:, ::2].mean(1), truth[:, 1::2].mean(1)) or 0.0
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


BENCHMARK = Benchmark(NAME, __doc__, training_runs, train, summary, markdown, appendix)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
