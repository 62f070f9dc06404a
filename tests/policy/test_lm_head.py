"""The head's closed forms against what autograd makes of the plain formula, piece by piece or at once."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import assert_close
from helpers.tolerances import assert_close_to_rounding
from torch import Tensor
from torch.func import jvp

from fx_influence.policy import lm_head as head
from fx_influence.policy.lm_head import head_jvp, head_token_values, head_vjp
from fx_influence.policy.split import SplitPolicy
from fx_influence.types import Params, TokenValues

V, D, N = 11, 5, 7


def never(*_: object) -> Tensor:
    raise AssertionError("only the head is asked")


def linear_head(params: Params, x: Tensor) -> Tensor:
    return x @ params["w"].T + params["b"]


def policy(vocab_size: int | None = V) -> SplitPolicy:
    return SplitPolicy(
        backbone=never,
        backbone_eager=never,
        backbone_vmap=never,
        backbone_jvp=never,  # type: ignore[arg-type]
        head=linear_head,
        head_parameters=frozenset({"w", "b"}),
        vocab_size=vocab_size,
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


@pytest.fixture(params=[1, 3 * V, 10**6])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many logits exist at once: one token's, three tokens', all."""
    return int(request.param)


@pytest.fixture
def pieces(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = head._pieces
    monkeypatch.setattr(head, "_pieces", lambda count, policy, *_: original(count, policy, at_once))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("impossible", [False, True])
def test_scores_are_the_log_softmax_and_its_entropy(at_once: int, temperature: float, impossible: bool) -> None:
    params, x, targets = setting(impossible=impossible)
    found = head_token_values(policy(), params, x, targets, temperature, at_once)
    for value, expected in zip(found, plain(params, x, targets, temperature), strict=True):
        assert_close(value, expected)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("present", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("impossible", [False, True])
def test_the_pull_is_the_gradient_of_the_loss(present: tuple[bool, bool], impossible: bool) -> None:
    params, x, targets = setting(impossible=impossible)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    c, b = (torch.linspace(-1, 2, N, dtype=torch.float64) * (k + 1) if here else None for k, here in enumerate(present))
    own = x.clone().requires_grad_()
    values = plain(leaves, own, targets, 0.7)
    loss = -sum((w * v).sum() for w, v in zip((c, b), values, strict=True) if w is not None)
    expected = torch.autograd.grad(loss, [own, leaves["w"], leaves["b"]])  # type: ignore[arg-type]
    d_features, grads = head_vjp(policy(), leaves, x, targets, (c, b), 0.7)
    assert grads["w"] is not None
    assert grads["b"] is not None
    for found, wanted in zip((d_features, grads["w"], grads["b"]), expected, strict=True):
        assert_close(found, wanted)
        assert wanted.abs().max() > 0.1


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("impossible", [False, True])
def test_the_slopes_are_the_jvp(impossible: bool) -> None:
    params, x, targets = setting(impossible=impossible)
    generator = torch.Generator().manual_seed(1)
    along = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in params.items()}
    dx = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    expected = jvp(lambda p, x: plain(p, x, targets, 0.7), (params, x), (along, dx))[1]
    for value, wanted in zip(head_jvp(policy(), params, along, x, dx, targets, 0.7), expected, strict=True):
        assert_close(value, wanted)
        assert wanted.abs().max() > 0.1


def test_a_parameter_that_requires_no_gradient_or_is_not_in_the_head_has_none() -> None:
    params, x, targets = setting()
    leaves = {"w": params["w"].requires_grad_(), "b": params["b"], "body": torch.ones(2).requires_grad_()}
    grads = head_vjp(policy(), leaves, x, targets, (torch.ones(N), None), 1.0)[1]
    assert grads.keys() == {"w", "body"}
    assert grads["w"] is not None
    assert grads["body"] is None


def test_no_tokens_give_empty_values() -> None:
    params, x, targets = setting()
    assert head_token_values(policy(None), params, x[:0], targets[:0], 1.0).logprobs.shape == (0,)
    assert head_vjp(policy(), params, x[:0], targets[:0], (torch.ones(0), None), 1.0)[0].shape == (0, D)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_is_promoted_before_the_softmax(dtype: torch.dtype) -> None:
    params, x, targets = setting(dtype)
    found = head_token_values(policy(), params, x, targets, 1.0)
    wide = linear_head(params, x).float().log_softmax(-1)[torch.arange(N), targets]
    assert found.logprobs.dtype == torch.float32
    # The maps are the same; only the float32 log-softmax over the vocabulary rounds.
    assert_close_to_rounding(found.logprobs, wide, terms=wide.numel() + V, dtype=torch.float32)
