"""Sums by kind of a real step, and the change of an enumerable policy's entropy under weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import assert_close, dyadic_policy, make_apply, random_adamw_state
from helpers.enumeration import Space, enumerate_completions, exact_entropy, exact_gradient, replicate, sample
from helpers.present import present
from helpers.tolerances import assert_within, central_difference, policy_terms
from torch import Tensor

import fx_influence as fx
from fx_influence.control import KindSums
from fx_influence.core.tree import shift
from fx_influence.labels import Labels
from fx_influence.types import AdamWState, Apply, Batch, Params

PROMPTS, EOS, VOCAB, LENGTH = [torch.tensor([1]), torch.tensor([2])], 0, 3, 2
OLD = 10**9
"""Steps that AdamW made: its second moments no longer move with one gradient, so that weights leave denominators."""


class Step:
    """A step of a policy whose completions can be listed: E is its distribution, so influences have no error."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.apply, self.params = make_apply(dyadic_policy(generator))
        self.space: Space = enumerate_completions(PROMPTS, EOS, VOCAB, LENGTH)
        every = replicate(self.apply, self.params, self.space, 2 * 8 * 4 * 4)
        self.batch_e = every._replace(group=torch.arange(len(every.input_ids)))
        rows = sample(self.apply, self.params, self.space, 12, generator)
        self.advantages = torch.randn(12, generator=generator, dtype=torch.float64)
        c = fx.coefficients("dapo", self.advantages, rows.completion_mask)
        self.batch = rows._replace(coefficients=c, group=torch.arange(12) // 2)
        hyper: dict[str, Any] = {"beta2": 1 - 1 / OLD, "step": OLD, "lr_scale": 1.0, "weight_decay": 0.1}
        state = random_adamw_state(generator, self.params, **hyper)
        self.state: AdamWState = state._replace(exp_avg={name: torch.zeros_like(x) for name, x in self.params.items()})
        values = fx.token_values(self.params, self.batch, self.apply)
        regions = fx.labels.regions(self.batch, values, self.advantages)
        self.kinds = fx.control.kinds(regions, ["math"] * 6 + ["code"] * 6)

    def sums(self, batch: Batch) -> KindSums:
        """Return the sums over kinds of the step on a batch with these coefficients."""
        options: dict[str, Any] = {"apply": self.apply, "labels": self.kinds}
        entropy = fx.influence(self.params, batch, self.batch_e, self.state, **options)
        rewards = self.batch_e.input_ids.sum(1).double()
        objective = fx.expected_reward(rewards)
        reward = fx.influence(self.params, batch, self.batch_e, self.state, objective=objective, **options)
        return fx.control.kind_sums(entropy, reward, self.kinds)

    def weighted(self, weights: dict[str, float]) -> Batch:
        c = present(self.batch.coefficients)
        return self.batch._replace(coefficients=c * fx.control.token_weights(self.kinds, weights))


@pytest.fixture(scope="module")
def step() -> Step:
    return Step()


def optimizer_direction(apply: Apply, params: Params, batch: Batch, state: AdamWState, lr: float) -> Params:
    """Return (theta' - theta) / lr of ``torch.optim.AdamW`` itself on the loss of the batch's coefficients."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    [hyper] = set(state.hyper.values())
    optimizer = torch.optim.AdamW(
        leaves.values(), lr, (hyper.beta1, hyper.beta2), eps=hyper.eps, weight_decay=hyper.weight_decay
    )
    for name, p in leaves.items():
        moments = {"exp_avg": state.exp_avg[name].clone(), "exp_avg_sq": state.exp_avg_sq[name].clone()}
        optimizer.state[p] = {"step": torch.tensor(float(state.step[name])), **moments}
    logits = apply(leaves, batch.input_ids, batch.attention_mask)[:, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    c = torch.where(batch.completion_mask, present(batch.coefficients), 0.0)
    (-(c[:, 1:] * logprobs).sum()).backward()
    optimizer.step()
    return {name: (p.detach() - params[name]) / lr for name, p in leaves.items()}


def test_predicted_change_is_measured_as_lr_vanishes(step: Step) -> None:
    """A real AdamW step with the weighted coefficients changes the exact entropy as the weights predicted."""
    state = fx.control.update(fx.control.control_state(), step.sums(step.batch), forgetting=0.9)
    entropy = float(exact_entropy(step.apply, step.params, step.space))
    plain = fx.control.weights(state, entropy, -10.0, lr=1.0, confidence=0.0, bounds=(1.0, 1.0)).entropy
    lr = 1e-3
    target = entropy + 10 * lr * (plain + 0.05 * abs(plain))
    out = fx.control.weights(state, entropy, target, lr=lr, confidence=0.0)
    assert out.reached
    assert (out.weights - 1).abs().max() > 0.01
    v = optimizer_direction(step.apply, step.params, step.weighted(out.by_kind), step.state, lr)
    exact = exact_gradient(step.apply, step.params, step.space)
    size = sum(float((exact[name] * v[name]).abs().sum()) for name in v)
    # Second moments move by 1e-9 of a gradient's square over theirs, which are 0.01 at least.
    moved = size * 100 / OLD
    terms = policy_terms(step.params, 4)

    def after(eta: float) -> Tensor:
        return exact_entropy(step.apply, shift(step.params, v, eta), step.space)

    slope, bound = central_difference(after, 1e-3, terms=terms)
    assert_within(slope, torch.tensor(out.entropy, dtype=torch.float64), bound + moved)
    errors = [abs(float(after(eta) - after(0.0)) / eta - out.entropy) for eta in (1e-2, 1e-3)]
    assert errors[1] < 0.2 * errors[0]


def test_influences_in_force_have_those_of_weight_one(step: Step) -> None:
    weights = dict(zip(step.kinds.names, (0.5, 1.5, 0.25, 0.75) * 3, strict=False))
    plain, weighted = step.sums(step.batch), step.sums(step.weighted(weights))
    assert not torch.allclose(plain.entropy, weighted.entropy)
    state = fx.control.update(fx.control.control_state(), weighted, forgetting=0.9, in_force=weights)
    estimate = state.estimate()
    # Denominators move by 1e-9 of a gradient's square over theirs.
    for name in ("entropy", "reward"):
        size = getattr(plain, name).abs().sum()
        assert_within(getattr(estimate, name), getattr(plain, name), float(size) * 100 / OLD, name)


def test_kind_sums_add_up_and_have_their_errors(step: Step) -> None:
    options: dict[str, Any] = {"apply": step.apply, "labels": step.kinds}
    out = fx.influence(step.params, step.batch, step.batch_e, step.state, **options)
    sums = fx.control.kind_sums(out, out, step.kinds, lifetime_factor=3.0)
    assert_close(sums.entropy.sum(), 3 * out.per_sequence.sum())
    assert_close(sums.entropy_covariance.diagonal().sqrt(), 3 * out.sums(step.kinds).stderr.nan_to_num())
    assert_close(sums.rest, out.weight_decay + 3 * out.unattributed)
    assert sums.degrees_of_freedom == 7
    tokens = present(present(out.deviations).tokens)
    parts = torch.stack([tokens[:, step.kinds.index == k].sum(1) for k in range(len(step.kinds.names))], dim=1)
    assert_close(sums.entropy_covariance, 9 * 8 / 7 * parts.T @ parts)


def test_lifetime_factor_is_that_of_the_preconditioner(step: Step) -> None:
    options: dict[str, Any] = {"apply": step.apply, "labels": step.kinds}
    young = step.state._replace(step=dict.fromkeys(step.state.step, 3))
    frozen, lifetime = (
        fx.influence(step.params, step.batch, step.batch_e, young, preconditioner=name, **options)
        for name in ("frozen", "lifetime")
    )
    beta1 = next(iter(young.hyper.values())).beta1
    factor = (1 - beta1**4) / (1 - beta1)
    a = fx.control.kind_sums(frozen, frozen, step.kinds, factor)
    b = fx.control.kind_sums(lifetime, lifetime, step.kinds)
    assert_close(a.entropy, b.entropy)
    assert_close(a.rest, b.rest)


def test_kind_sums_refuse_influences_without_errors(step: Step) -> None:
    out = fx.influence(step.params, step.batch, step.batch_e, step.state, apply=step.apply, stderr=False)
    with pytest.raises(ValueError, match="entropy has no errors of its sums by kind"):
        fx.control.kind_sums(out, out, step.kinds)


def test_token_weights_leave_other_tokens() -> None:
    kinds = Labels(torch.tensor([[-1, 0, 1, 2]]), ("a", "b", "c"))
    assert fx.control.token_weights(kinds, {"a": 0.0, "c": 1.5}).tolist() == [[1.0, 0.0, 1.0, 1.5]]
