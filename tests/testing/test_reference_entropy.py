"""The reference's estimators of entropy against enumeration and sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.cases import (
    TinyPolicy,
    assert_close,
    dyadic_policy,
    make_apply,
    random_batch,
    random_direction,
)
from helpers.enumeration import (
    enumerate_completions,
    exact_entropy,
    exact_gradient,
    exact_log_probs,
    replicate,
    sample,
)
from helpers.reference_cases import estimates, generator, policy
from helpers.tolerances import TINY_POLICY, assert_within, central_difference
from torch import Tensor

from fx_influence.testing import reference as ref
from fx_influence.types import (
    Estimator,
    Normalize,
)


@estimates
@pytest.mark.parametrize("clip", [10.0, 0.05, None])
def test_snis_delta_contributions_sum_to_delta_h(
    estimator: Estimator, normalize: Normalize, clip: float | None
) -> None:
    apply, params = policy()
    batch = random_batch(generator(2), 6, 7, 5, gaps=True, min_len=0)
    out = ref.snis_delta(
        apply, params, random_direction(generator(9), params), 2.0, batch, estimator, normalize, clip, 0.8
    )
    assert out.delta_h.abs() > 1e-3
    assert_close(out.contributions.sum(), out.delta_h)
    assert not batch.completion_mask[0].any()
    assert_close(out.contributions[0], torch.zeros_like(out.delta_h), out.contributions)
    assert 1 <= out.ess < 6
    assert (out.clip_fraction > 0) == (clip == 0.05)


@estimates
def test_snis_delta_over_eta_tends_to_surrogate_gradients(estimator: Estimator, normalize: Normalize) -> None:
    apply, params = policy()
    batch = random_batch(generator(3), 6, 7, 5, gaps=True, min_len=0, padding="left")
    v = random_direction(generator(9), params)
    rows = ref.entropy_gradients(apply, params, batch, estimator, normalize, 0.8)
    derivatives = torch.tensor([ref.inner(row, v) for row in rows], dtype=torch.float64)
    assert derivatives.abs().max() > 1e-2

    def moved(eta: float) -> Tensor:
        out = ref.snis_delta(apply, params, v, eta, batch, estimator, normalize, temperature=0.8)
        return torch.cat([out.contributions, out.delta_h.reshape(1)])

    expected, bound = central_difference(moved, 1e-4, terms=TINY_POLICY, magnitude=math.log(5))
    assert bound < 1e-3 * derivatives.abs().max()
    assert_within(torch.cat([derivatives, derivatives.sum().reshape(1)]), expected, bound)


def test_snis_delta_diagnostics_match_hand_computation() -> None:
    apply, params = policy()
    batch = random_batch(generator(4), 5, 7, 5)
    v = random_direction(generator(9), params)
    moved = {name: p + 3.0 * v[name] for name, p in params.items()}
    old, new = (ref.token_values(apply, p, batch) for p in (params, moved))
    delta = new.logprobs - old.logprobs
    log_w = delta.sum(1)
    by_sequence = ref.snis_delta(apply, params, v, 3.0, batch, "sequence", clip=0.1)
    assert_close(by_sequence.log_weights, log_w)
    w = log_w.clamp(-0.1, 0.1).exp()
    assert_close(by_sequence.ess, w.sum() ** 2 / (w**2).sum())
    assert_close(by_sequence.clip_fraction, (log_w.abs() > 0.1).double().mean())
    mask = batch.completion_mask
    prefix = delta.cumsum(1) - delta
    out = ref.snis_delta(apply, params, v, 3.0, batch, "per_decision", clip=0.1)
    assert_close(out.log_weights, log_w)
    assert_close(out.clip_fraction, (prefix.abs() > 0.1)[mask].double().mean())
    assert 0 < out.clip_fraction < 1
    # Without gaps a row's columns are its ranks from the first token on; a finished row keeps its full weight.
    first, last = mask.int().argmax(1), mask.sum(1)
    sizes = []
    for k in range(int(last.max())):
        w = torch.stack([prefix[a, first[a] + k] if k < last[a] else log_w[a] for a in range(5)]).clamp(-0.1, 0.1).exp()
        sizes.append(w.sum() ** 2 / (w**2).sum())
    assert_close(out.ess, min(sizes))
    assert sizes[-1] < sizes[1] < sizes[0] == 5


@estimates
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_estimators_are_exact_on_full_distribution(
    estimator: Estimator, normalize: Normalize, temperature: float
) -> None:
    """E is the policy's distribution, with each completion n p times, so neither estimator has a sampling error."""
    apply, params = make_apply(dyadic_policy(generator(5)))
    params["table"] = params["table"] * temperature
    prompts = [torch.tensor([1]), torch.tensor([2, 1])]
    space = enumerate_completions(prompts, eos_id=0, vocab_size=3, max_new_tokens=3, temperature=temperature)
    assert len(space.batch.input_ids) == 2 * (1 + 2 + 4 * 3)
    assert_close(exact_log_probs(apply, params, space).exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    batch = replicate(apply, params, space, 256)
    exact = exact_gradient(apply, params, space, normalize)["table"]
    computed = ref.add(ref.entropy_gradients(apply, params, batch, estimator, normalize, temperature))["table"]
    assert computed is not None
    assert exact.abs().max() > 0.05
    assert_close(computed, exact)
    v, eta = random_direction(generator(9), params), 5.0
    moved = {name: p + eta * v[name] for name, p in params.items()}
    before, after = (exact_entropy(apply, p, space, normalize) for p in (params, moved))
    out = ref.snis_delta(apply, params, v, eta, batch, estimator, normalize, None, temperature)
    assert (after - before).abs() > 0.01
    assert_close(out.delta_h, after - before)


@pytest.mark.slow
@estimates
def test_entropy_estimators_match_exact_value_on_sample(estimator: Estimator, normalize: Normalize) -> None:
    apply, params = make_apply(TinyPolicy(vocab=3, dim=4, max_len=6, seed=3))
    prompts = [torch.tensor([1]), torch.tensor([2, 2])]
    space = enumerate_completions(prompts, eos_id=0, vocab_size=3, max_new_tokens=3, temperature=1.5)
    n, v, eta = 400, exact_gradient(apply, params, space, normalize), 0.3
    batch = sample(apply, params, space, n, generator(7))
    moved = {name: p + eta * v[name] for name, p in params.items()}
    exact = exact_entropy(apply, moved, space, normalize) - exact_entropy(apply, params, space, normalize)
    out = ref.snis_delta(apply, params, v, eta, batch, estimator, normalize, 10.0, 1.5)
    error = out.contributions.std() * math.sqrt(n)
    assert error < exact.abs() / 4, "the estimate is more than noise"
    assert (out.delta_h - exact).abs() < 3 * error
    gradients = ref.entropy_gradients(apply, params, batch, estimator, normalize, 1.5)
    derivatives = torch.tensor([ref.inner(row, v) for row in gradients], dtype=torch.float64)
    derivative = ref.inner(v, v)
    assert derivatives.std() * math.sqrt(n) < abs(derivative) / 4
    assert (derivatives.sum() - derivative).abs() < 3 * derivatives.std() * math.sqrt(n)


def test_sample_follows_enumerated_distribution() -> None:
    apply, params = make_apply(TinyPolicy(vocab=3, dim=4, max_len=6, seed=3))
    space = enumerate_completions([torch.tensor([1]), torch.tensor([2, 2])], 0, 3, 2, temperature=1.5)
    n, p = 20000, exact_log_probs(apply, params, space).exp()
    batch = sample(apply, params, space, n, generator(1))
    assert batch.group is not None
    assert space.batch.group is not None
    same = (batch.input_ids[:, None] == space.batch.input_ids).all(-1)
    same &= (batch.completion_mask[:, None] == space.batch.completion_mask).all(-1)
    counts = same.double().sum(0)
    assert counts.sum() == n
    assert (((counts - n * p) ** 2 / (n * p)).sum()) < len(p) + 4 * math.sqrt(2 * len(p))
    assert (batch.group == (batch.input_ids[:, 0] == 2).long()).all()
