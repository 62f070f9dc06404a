"""The LM head's closed forms against autograd of the plain formula, chunk by chunk or at once."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import assert_close
from helpers.tolerances import assert_close_to_rounding
from torch import Tensor
from torch.func import jvp

from fx_influence.policy.lm_head import head_jvp, head_token_moments, head_token_values, head_vjp
from fx_influence.policy.split import MAX_LOGITS, SplitPolicy
from fx_influence.types import Params, TokenValues

V, D, N = 11, 5, 7


def never(*_: object) -> Tensor:
    raise AssertionError("only the head may be called")


def linear_head(params: Params, x: Tensor) -> Tensor:
    return x @ params["w"].T + params["b"]


def policy(vocab_size: int | None = V, max_logits: int = MAX_LOGITS) -> SplitPolicy:
    return SplitPolicy(
        backbone=never,
        backbone_eager=never,
        backbone_vmap=never,
        backbone_jvp=never,  # type: ignore[arg-type]
        head=linear_head,
        head_parameters=frozenset({"w", "b"}),
        vocab_size=vocab_size,
        max_logits=max_logits,
    )


def setting(dtype: torch.dtype = torch.float64, impossible: bool = False) -> tuple[Params, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = {"w": torch.randn(V, D, generator=generator), "b": torch.randn(V, generator=generator)}
    if impossible:
        draw["b"][3] = -torch.inf
    targets = torch.randint(4, V, (N,), generator=generator)
    features = 2 * torch.randn(N, D, generator=generator)
    return {name: x.to(dtype) for name, x in draw.items()}, features.to(dtype), targets


def plain(params: Params, x: Tensor, targets: Tensor, temperature: float) -> TokenValues:
    log_pi = (linear_head(params, x) / temperature).log_softmax(-1)
    log_pi_or_0 = torch.where(log_pi == -torch.inf, 0.0, log_pi)
    return TokenValues(log_pi[torch.arange(N), targets], -(log_pi.exp() * log_pi_or_0).sum(-1))


@pytest.fixture(params=[1, 3 * V, 10**6], ids=["1 token", "3 tokens", "all tokens"])
def max_logits(request: pytest.FixtureRequest) -> int:
    """Return the number of logits that exist at once."""
    return int(request.param)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("impossible", [False, True])
def test_head_token_values_match_log_softmax(max_logits: int, temperature: float, impossible: bool) -> None:
    params, x, targets = setting(impossible=impossible)
    values = head_token_values(policy(), params, x, targets, temperature, max_logits)
    for value, expected in zip(values, plain(params, x, targets, temperature), strict=True):
        assert_close(value, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("impossible", [False, True])
def test_head_token_moments_match_direct_sums(max_logits: int, temperature: float, impossible: bool) -> None:
    params, x, targets = setting(impossible=impossible)
    moments = head_token_moments(policy(max_logits=max_logits), params, x, targets, temperature)
    z = linear_head(params, x) / temperature
    # Of squares of probabilities by the log-sum-exp of the doubled logits.
    assert_close(moments.collision, ((2 * z).logsumexp(-1) - 2 * z.logsumexp(-1)).exp())
    pi = z.softmax(-1)
    expected = torch.stack([sum((p * p * p.log() for p in row if p > 0), torch.zeros(()).double()) for row in pi])
    assert_close(moments.collision_logprobs, expected)
    for value, wanted in zip(moments[:2], plain(params, x, targets, temperature), strict=True):
        assert_close(value, wanted)


@pytest.mark.parametrize("present", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("impossible", [False, True])
def test_head_vjp_matches_autograd(max_logits: int, present: tuple[bool, bool], impossible: bool) -> None:
    params, x, targets = setting(impossible=impossible)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    c, b = (
        torch.linspace(-1, 2, N, dtype=torch.float64) * (k + 1) if is_given else None
        for k, is_given in enumerate(present)
    )
    leaf = x.clone().requires_grad_()
    values = plain(leaves, leaf, targets, 0.7)
    loss = -sum((w * v).sum() for w, v in zip((c, b), values, strict=True) if w is not None)
    expected = torch.autograd.grad(loss, [leaf, leaves["w"], leaves["b"]])  # type: ignore[arg-type]
    d_hidden, grads = head_vjp(policy(max_logits=max_logits), leaves, x, targets, (c, b), 0.7)
    assert grads["w"] is not None
    assert grads["b"] is not None
    for actual, wanted in zip((d_hidden, grads["w"], grads["b"]), expected, strict=True):
        assert_close(actual, wanted)
        assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("impossible", [False, True])
def test_head_jvp_matches_autograd(max_logits: int, impossible: bool) -> None:
    params, x, targets = setting(impossible=impossible)
    generator = torch.Generator().manual_seed(1)
    tangent = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in params.items()}
    dx = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    expected = jvp(lambda p, x: plain(p, x, targets, 0.7), (params, x), (tangent, dx))[1]
    for value, wanted in zip(
        head_jvp(policy(max_logits=max_logits), params, tangent, x, dx, targets, 0.7), expected, strict=True
    ):
        assert_close(value, wanted)
        assert wanted.abs().max() > 0.1


def test_head_vjp_has_gradients_of_trained_head_parameters() -> None:
    params, x, targets = setting()
    leaves = {"w": params["w"].requires_grad_(), "b": params["b"], "body": torch.ones(2).requires_grad_()}
    grads = head_vjp(policy(), leaves, x, targets, (torch.ones(N), None), 1.0)[1]
    assert grads.keys() == {"w", "body"}
    assert grads["w"] is not None
    assert grads["body"] is None


def test_head_functions_accept_no_tokens() -> None:
    params, x, targets = setting()
    assert head_token_values(policy(None), params, x[:0], targets[:0], 1.0).logprobs.shape == (0,)
    assert head_token_moments(policy(None), params, x[:0], targets[:0], 1.0).collision.shape == (0,)
    assert head_vjp(policy(), params, x[:0], targets[:0], (torch.ones(0), None), 1.0)[0].shape == (0, D)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_token_values_promote_before_softmax(dtype: torch.dtype) -> None:
    params, x, targets = setting(dtype)
    values = head_token_values(policy(), params, x, targets, 1.0)
    wide = linear_head(params, x).float().log_softmax(-1)[torch.arange(N), targets]
    assert values.logprobs.dtype == torch.float32
    # The maps are the same; only the float32 log-softmax over the vocabulary rounds.
    assert_close_to_rounding(values.logprobs, wide, terms=wide.numel() + V, dtype=torch.float32)
