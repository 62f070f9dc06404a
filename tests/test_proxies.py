"""Proxies against finite differences of softmaxes that a step moves, enumeration, loops and NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import TinyPolicy, add_padding, assert_close, make_apply, random_batch
from helpers.present import present
from helpers.tolerances import assert_close_to_rounding, assert_within, central_difference, rounding_bound
from torch import Tensor

import fx_influence as fx
from fx_influence import proxies
from fx_influence.types import Batch, Params

VOCAB, WIDTH = 5, 8
TERMS = 100
"""Roundings on the way to one proxy of a table's softmax, generously."""


def table_apply(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return logits of a tabular policy: a row of the table for each previous token."""
    return params["w"][input_ids]


def table(vocab: int = VOCAB, scale: float = 1.5, seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {"w": scale * torch.randn(vocab, vocab, generator=generator, dtype=torch.float64)}


def batch_of(n: int = 6, vocab: int = VOCAB, **options: Any) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return random_batch(generator, n, WIDTH, vocab, **{"gaps": True, "min_len": 0, **options})


def softmax(z: Tensor) -> Tensor:
    e = (z - z.max(-1, keepdim=True).values).exp()
    return e / e.sum(-1, keepdim=True)


def entropy(z: Tensor) -> Tensor:
    p = softmax(z)
    return -(p * p.log()).sum(-1)


def completion_tokens(batch: Batch) -> list[tuple[int, int, int, int]]:
    """Return (row, column, previous token, token) of every completion token."""
    ids = batch.input_ids.tolist()
    return [(i, t, ids[i][t - 1], ids[i][t]) for i, t in batch.completion_mask.nonzero().tolist()]


def moments_of(logits: Tensor, targets: Tensor) -> fx.TokenMoments:
    """Return the moments of softmaxes (n, V) as a batch of one row, by the formulas as they stand."""
    p, log_p = softmax(logits), softmax(logits).log()
    chosen = log_p[torch.arange(len(targets)), targets]
    fields = (chosen, -(p * log_p).sum(-1), p.square().sum(-1), (p.square() * log_p).sum(-1))
    return fx.TokenMoments(*(x.unsqueeze(0) for x in fields))


def random_softmaxes(vocab: int, count: int = 200) -> tuple[Tensor, Tensor, fx.TokenMoments, Tensor]:
    """Return logits (count, V) of small to large entropy, tokens, their moments and a mask of one row."""
    generator = torch.Generator().manual_seed(vocab)
    scale = torch.linspace(0.1, 4.0, count, dtype=torch.float64).unsqueeze(1)
    logits = scale * torch.randn(count, vocab, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (count,), generator=generator)
    return logits, targets, moments_of(logits, targets), torch.ones(1, count, dtype=torch.bool)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_token_moments_match_direct_sums(padding: Any, temperature: float, chunk_size: int | None) -> None:
    apply, params = make_apply(TinyPolicy(VOCAB, 6, 1, 2, 2 * WIDTH))
    batch = batch_of(padding=padding)
    moments = proxies.token_moments(params, batch, apply=apply, temperature=temperature, chunk_size=chunk_size)
    expected = np.zeros((4, *batch.input_ids.shape))
    logits = apply(params, batch.input_ids, batch.attention_mask).detach().numpy() / temperature
    for i, t, _, y in completion_tokens(batch):
        z = logits[i, t - 1]
        p = np.exp(z) / np.exp(z).sum()
        expected[:, i, t] = np.log(p[y]), -sum(p * np.log(p)), sum(p**2), sum(p**2 * np.log(p))
        # The identity by log-sum-exp of the logits.
        lse_2z, lse_z = np.log(np.exp(2 * z).sum()), np.log(np.exp(z).sum())
        assert_close_to_rounding(moments.collision[i, t], np.exp(lse_2z - 2 * lse_z), terms=TERMS)
    for value, direct in zip(moments, expected, strict=True):
        assert_close(value, torch.from_numpy(direct))
    values = fx.token_values(params, batch, apply, temperature)
    assert_close(moments.logprobs, values.logprobs)
    assert_close(moments.entropies, values.entropies)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_exact_tabular_is_the_derivative_of_a_table(temperature: float) -> None:
    """A step of SGD on the table changes the entropy of each of its softmaxes by the sum over that state's tokens."""
    params, batch = table(), batch_of(12)
    c = present(batch.coefficients)
    w = params["w"].clone().requires_grad_()
    log_pi = (w / temperature).log_softmax(-1)
    losses = [-c[i, t] * log_pi[s, y] for i, t, s, y in completion_tokens(batch)]
    [g] = torch.autograd.grad(torch.stack(losses).sum(), [w])
    slope = central_difference(lambda lr: entropy((params["w"] - lr * g) / temperature), 1e-4, terms=TERMS)
    moments = proxies.token_moments(params, batch, apply=table_apply, temperature=temperature)
    proxy = proxies.exact_tabular(moments, c, batch.completion_mask)
    by_state = torch.zeros(VOCAB, dtype=torch.float64)
    for i, t, s, _ in completion_tokens(batch):
        by_state[s] += proxy[i, t]
    assert_within(by_state / temperature**2, slope.slope, slope.bound)
    assert slope.bound < 1e-4 * by_state.abs().max()
    assert not proxy[~batch.completion_mask].any()


def test_exact_tabular_has_mean_0_under_the_policy() -> None:
    logits, _, _, mask = random_softmaxes(4, 30)
    mean = torch.zeros(1, 30, dtype=torch.float64)
    for y in range(4):
        targets = torch.full((30,), y)
        proxy = proxies.exact_tabular(moments_of(logits, targets), torch.ones_like(mean), mask)
        mean += softmax(logits)[:, y] * proxy
    assert_close(mean, torch.zeros_like(mean))


@pytest.mark.parametrize("vocab", [2, 7])
def test_steer_and_repo_are_derivatives_by_the_sampled_logit(vocab: int) -> None:
    logits, targets, moments, mask = random_softmaxes(vocab)
    n = len(targets)
    weight = torch.linspace(-2.0, 1.0, n, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(targets, vocab).double()
    for proxy, move in (
        (proxies.steer(moments, weight.unsqueeze(0), mask), weight * (1 - softmax(logits)[torch.arange(n), targets])),
        (proxies.repo(moments, weight.unsqueeze(0), mask), weight),
    ):
        step = move.unsqueeze(1) * one_hot
        slope = central_difference(lambda lr, step=step: entropy(logits + lr * step), 1e-4, terms=TERMS)  # type: ignore[misc]
        assert_within(proxy[0], slope.slope, slope.bound)
        assert proxy.abs().max() > 1e4 * slope.bound


def test_exact_tabular_is_steer_and_the_other_logits() -> None:
    logits, targets, moments, mask = random_softmaxes(6, 40)
    c = torch.linspace(-1.0, 2.0, 40, dtype=torch.float64).unsqueeze(0)
    others = torch.zeros(1, 40, dtype=torch.float64)
    for k, (p, y) in enumerate(zip(softmax(logits).tolist(), targets.tolist(), strict=True)):
        h = -sum(x * math.log(x) for x in p)
        others[0, k] = c[0, k] * sum(x * x * (math.log(x) + h) for j, x in enumerate(p) if j != y)
    assert_close(proxies.exact_tabular(moments, c, mask), proxies.steer(moments, c, mask) + others)


def test_covariance_averages_to_minus_numpys() -> None:
    params, batch = table(), batch_of()
    values, mask = fx.token_values(params, batch, table_apply), batch.completion_mask
    by_row = torch.tensor([1.0, -0.5, 0.3, -2.0, 0.7, 0.1], dtype=torch.float64)
    by_token = torch.where(mask, by_row.unsqueeze(1) * torch.arange(WIDTH), math.nan)
    for advantages in (by_row, by_token):
        proxy = proxies.covariance(values, advantages, mask)
        a = advantages.unsqueeze(1).expand(mask.shape) if advantages.dim() == 1 else advantages
        expected = -np.cov(values.logprobs[mask].numpy(), a[mask].numpy(), bias=True)[0, 1]
        assert_close(proxy[mask].mean(), torch.tensor(expected), proxy.abs().max())
        assert not proxy[~mask].any()
    wider = add_padding(batch, 2, 3)
    padded = proxies.covariance(fx.token_values(params, wider, table_apply), by_row, wider.completion_mask)
    assert_close(padded[:, 2:-3], proxies.covariance(values, by_row, mask))


@pytest.mark.parametrize("vocab", [2, 3, 8])
def test_relative_surprisal_1_is_a_boundary_of_signs(vocab: int) -> None:
    """1 is the boundary of STEER and REPO. Of the exact change it is an upper bound, and exact for two tokens.

    exact / c = p h (r - 1) + Cov_pi(pi, log pi), and two increasing functions of pi covary positively.
    """
    logits, _, moments, mask = random_softmaxes(vocab)
    r, one = proxies.relative_surprisal(moments, mask), torch.ones(mask.shape, dtype=torch.float64)
    for proxy in (proxies.steer, proxies.repo):
        assert torch.equal(proxy(moments, one, mask) > 0, r > 1)
        assert torch.equal(proxy(moments, -one, mask) < 0, r > 1)
    exact = proxies.exact_tabular(moments, one, mask)
    assert (exact[r > 1] > 0).all()
    p, h = moments.logprobs.exp(), moments.entropies
    covariance = torch.tensor([np.cov(q, np.log(q), bias=True, aweights=q)[0, 1] for q in softmax(logits).numpy()])
    boundary = 1 - covariance / (p * h)
    assert torch.equal(exact > 0, r > boundary)
    between = (r < 1) & (exact > 0)
    assert bool(between.any()) == (vocab > 2)


def test_grpo_dropout_matches_a_loop_over_rollouts() -> None:
    params, batch = table(), batch_of(groups=3)
    values, group = fx.token_values(params, batch, table_apply), present(batch.group)
    a = torch.tensor([1.0, -0.5, 0.3, -2.0, 0.7, 0.1], dtype=torch.float64)
    expected = torch.zeros(6, dtype=torch.float64)
    for i, _, s, y in completion_tokens(batch):
        p = softmax(params["w"][s])
        siblings = group.tolist().count(int(group[i]))
        expected[i] += a[i] / siblings * (-p[y].log() + (p * p.log()).sum())
    assert_close(proxies.grpo_dropout(values, a, batch.completion_mask, 7 * group), expected)
    assert expected[0] == 0, "a row without a completion token"


def test_grpo_dropout_has_mean_0_over_all_completions() -> None:
    params, length = table(3), 3
    rows = torch.tensor([[0, *tokens] for tokens in product(range(3), repeat=length)])
    mask = torch.ones_like(rows, dtype=torch.bool)
    completion = mask & (torch.arange(length + 1) > 0)
    values = fx.token_values(params, Batch(rows, mask, completion), table_apply)
    one, group = torch.ones(len(rows), dtype=torch.float64), torch.arange(len(rows))
    proxy, chance = proxies.grpo_dropout(values, one, completion, group), values.logprobs.sum(-1).exp()
    assert_close(chance.sum(), torch.tensor(1.0).double())
    assert_close((chance * proxy).sum(), torch.tensor(0.0).double(), proxy.abs().sum())


PER_TOKEN: dict[str, Callable[[fx.TokenMoments, Tensor, Tensor], Tensor]] = {
    "exact_tabular": proxies.exact_tabular,
    "steer": proxies.steer,
    "repo": proxies.repo,
    "covariance": proxies.covariance,
    "relative_surprisal": lambda moments, _, mask: proxies.relative_surprisal(moments, mask),
}

EXTREMES = {
    "one possible token": [0.0, -math.inf, -math.inf],
    "almost one-hot": [0.0, -90.0, -800.0],
    "beyond the range of exp": [3e4, -3e4, 0.0],
    "one impossible token": [0.3, -math.inf, 0.1],
    "uniform": [2.0, 2.0, 2.0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logits", EXTREMES.values(), ids=EXTREMES)
def test_proxies_are_finite_for_extreme_logits(logits: list[float], dtype: torch.dtype) -> None:
    bias = torch.tensor(logits, dtype=dtype)
    ids = torch.tensor([[1, 0, 0, 2], [0, 0, 1, 0]])
    mask = torch.tensor([[False, True, True, False], [False, False, False, False]])
    batch = Batch(ids, torch.ones_like(mask), mask)
    # The logits as a frozen part: parameters themselves must be finite.
    moments = proxies.token_moments(
        {"b": torch.zeros(3, dtype=dtype)}, batch, apply=lambda p, ids, _: (p["b"] + bias).expand(*ids.shape, 3)
    )
    possible = np.array([x for x in logits if x > -math.inf])
    log_p = possible - possible.max() - np.log(np.exp(possible - possible.max()).sum())
    p = np.exp(log_p)
    for value, expected in zip(moments, (log_p[0], -p @ log_p, p @ p, (p * p) @ log_p), strict=True):
        assert_within(value[0, 1:3], [expected] * 2, rounding_bound(dtype, TERMS, 1 + abs(expected)))
        assert not value[~mask].any()
    weights = torch.where(mask, torch.tensor(2.0), math.nan)
    for name, proxy in PER_TOKEN.items():
        result = proxy(moments, weights, mask)
        assert result.isfinite().all(), name
        assert not result[~mask].any(), name
        assert result.dtype == dtype, name
    assert proxies.grpo_dropout(moments, torch.tensor([1.0, math.nan]), mask, torch.tensor([0, 0])).isfinite().all()
    if logits in (EXTREMES["one possible token"], EXTREMES["beyond the range of exp"], EXTREMES["uniform"]):
        scale = rounding_bound(dtype, TERMS, 2)
        assert_within(proxies.exact_tabular(moments, weights, mask), torch.zeros(2, 4), scale)


def test_proxies_of_a_vocabulary_of_one_token_are_0() -> None:
    mask = torch.tensor([[False, True, True]])
    batch = Batch(torch.zeros(1, 3, dtype=torch.long), mask | True, mask)
    moments = proxies.token_moments(
        {"b": torch.ones(1)}, batch, apply=lambda p, ids, _: p["b"].expand(*ids.shape, 1), temperature=0.5
    )
    assert moments.collision.tolist() == [[0.0, 1.0, 1.0]]
    for name, proxy in PER_TOKEN.items():
        assert not proxy(moments, torch.ones(1, 3), mask).any(), name


def test_tokens_that_the_policy_cannot_sample() -> None:
    mask = torch.tensor([[False, True, True]])
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).expand(3, 3)
    moments = moments_of(torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0, 0, 0]))
    moments = moments._replace(logprobs=p[0].log().unsqueeze(0))
    one = torch.ones(1, 3, dtype=torch.float64)
    # Its own logit has no derivative; pushing it up still moves the others, which here are uniform.
    for proxy in (proxies.exact_tabular, proxies.steer, proxies.repo):
        assert_close(proxy(moments, one, mask), torch.zeros(1, 3).double())
    assert proxies.relative_surprisal(moments, mask).tolist() == [[0.0, pytest.approx(1.0), math.inf]]
    for call in (
        lambda: proxies.covariance(moments, one, mask),
        lambda: proxies.grpo_dropout(moments, one[:, 0], mask, torch.zeros(1).long()),
    ):
        with pytest.raises(ValueError, match=r"values\.logprobs\[0, 2\] is -inf \(1 such tokens\); expected finite"):
            call()


def test_proxies_of_no_completion_are_0() -> None:
    params, batch = table(), batch_of()
    empty = batch._replace(completion_mask=torch.zeros_like(batch.completion_mask))
    moments = proxies.token_moments(params, empty, apply=table_apply)
    weights = torch.full(batch.input_ids.shape, math.nan)
    for proxy in PER_TOKEN.values():
        assert not proxy(moments, weights, empty.completion_mask).any()
    nothing = proxies.grpo_dropout(moments, weights[:, 0], empty.completion_mask, torch.arange(6))
    assert torch.equal(nothing, torch.zeros(6).double())


def test_token_moments_raise_half_precision() -> None:
    apply, params = make_apply(TinyPolicy(VOCAB, 6, 1, 2, 2 * WIDTH))
    half, batch = {name: p.bfloat16() for name, p in params.items()}, batch_of()
    moments, values = proxies.token_moments(half, batch, apply=apply), fx.token_values(half, batch, apply)
    wide = proxies.token_moments({name: p.double() for name, p in half.items()}, batch, apply=apply)
    for value, exact in zip(moments, wide, strict=True):
        assert value.dtype == torch.float32
        assert_close_to_rounding(value, exact, terms=4000, scale=1 + exact.abs(), dtype=torch.float32)
    assert_close_to_rounding(moments.entropies, values.entropies, terms=4000)


def test_proxies_name_what_is_wrong() -> None:
    params, batch = table(), batch_of()
    c, mask = present(batch.coefficients), batch.completion_mask
    values, moments = (
        fx.token_values(params, batch, table_apply),
        proxies.token_moments(params, batch, apply=table_apply),
    )
    with pytest.raises(TypeError, match=r"moments is of type TokenValues; expected TokenMoments\. Pass fx\.proxies"):
        proxies.exact_tabular(values, c, mask)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"values is of type Tensor; expected TokenValues or TokenMoments"):
        proxies.steer(values.logprobs, c, mask)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"completion_mask is torch\.int64 of shape \(6, 8\); expected bool"):
        proxies.repo(values, c, mask.long())
    with pytest.raises(ValueError, match=r"completion_mask is torch\.bool of shape \(5, 8\); expected bool"):
        proxies.relative_surprisal(values, mask[1:])
    with pytest.raises(ValueError, match=r"coefficients has shape \(6,\); expected \(6, 8\)\. Make them by fx\.coef"):
        proxies.exact_tabular(moments, c[:, 0], mask)
    with pytest.raises(ValueError, match=r"advantages has shape \(8,\); expected \(6, 8\) or \(6,\)"):
        proxies.covariance(values, c[0], mask)
    row, column = mask.nonzero().tolist()[0]
    bad = c.clone()
    bad[row, column] = math.inf
    with pytest.raises(ValueError, match=rf"advantages of token \[{row}, {column}\] is inf \(1 such tokens\)"):
        proxies.repo(values, bad, mask)
    with pytest.raises(ValueError, match=r"group has shape \(5,\); expected \(6,\), a number for each rollout"):
        proxies.grpo_dropout(values, c[:, 0], mask, torch.zeros(5))
    with pytest.raises(ValueError, match=r"advantages has shape \(6, 8\); expected \(6,\), a number"):
        proxies.grpo_dropout(values, c, mask, torch.zeros(6))
    with pytest.raises(ValueError, match=r"temperature is 0; expected a positive number"):
        proxies.token_moments(params, batch, apply=table_apply, temperature=0)
    with pytest.raises(TypeError, match=r"batch is of type dict; expected a fx\.Batch"):
        proxies.token_moments(params, batch._asdict(), apply=table_apply)  # type: ignore[arg-type]
