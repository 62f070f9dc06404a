"""Forward-mode rules and cached outputs bind arguments as torch does, and notice outputs of another forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cases import random_batch
from helpers.reweighted import reweighted_gradient
from torch import Tensor
from torch.func import jvp
from torch.nn import functional as F

from fx_influence.autodiff.directional import token_jvp
from fx_influence.autodiff.gradients import batch_gradient, gradient_with_cache
from fx_influence.policy.modes.forward_ad import ForwardMode, forward_mode_jvp
from fx_influence.policy.modes.linear_cache import LinearOutputCache, ReuseLinearOutputs
from fx_influence.types import Batch, Params, TokenValues

WIDTH = 5
BOUND = 2**10 * torch.finfo(torch.float64).eps
"""Of the largest value: float64 rounds each of fewer than 2**8 terms, with room for their signs."""


def weights() -> Params:
    generator = torch.Generator().manual_seed(3)
    shapes = {"x": (2, 3, WIDTH), "w": (WIDTH, WIDTH), "b": (WIDTH,), "row": (WIDTH,)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


CALLS: dict[str, Callable[[Params], Tensor]] = {
    "input_weight_bias": lambda p: F.linear(bias=p["b"], weight=p["w"], input=p["x"]),
    "weight": lambda p: F.linear(p["x"], weight=p["w"]),
    "bias": lambda p: F.linear(p["x"], p["w"], bias=p["b"]),
    "weight_of_one_axis": lambda p: F.linear(p["x"], p["row"]),
    "embedding": lambda p: F.embedding(weight=p["w"], input=torch.tensor([[1, 0, 1]]), padding_idx=0),
    "mul": lambda p: p["x"].mul(other=p["b"]),
    "attention": lambda p: F.scaled_dot_product_attention(value=p["x"], key=p["x"], query=p["x"], is_causal=True),
}


def reverse(f: Callable[[Params], Tensor], params: Params, u: Params) -> Tensor:
    """Return <d f_k / d params, u> of every entry k, by reverse mode."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    out = f(leaves)
    derivatives = []
    for entry in out.flatten():
        grads = torch.autograd.grad(
            entry, list(leaves.values()), retain_graph=True, materialize_grads=True, allow_unused=True
        )
        derivatives.append(
            sum(((g * u[name]).sum() for name, g in zip(leaves, grads, strict=True)), entry.new_zeros(()))
        )
    return torch.stack(derivatives).reshape(out.shape)


@pytest.mark.parametrize("call", CALLS)
def test_forward_mode_binds_arguments_by_name(call: str) -> None:
    params = weights()
    u = {name: p.flip(0) for name, p in params.items()}
    value, derivative = forward_mode_jvp(CALLS[call], params, u)
    expected = reverse(CALLS[call], params, u)
    torch.testing.assert_close(value, CALLS[call](params))
    torch.testing.assert_close(derivative, expected, rtol=0, atol=BOUND * float(expected.abs().max()))


@pytest.mark.parametrize("call", ["input_weight_bias", "weight", "bias", "weight_of_one_axis"])
def test_reuse_linear_outputs_binds_arguments_by_name(call: str) -> None:
    params = weights()
    cache = LinearOutputCache(10**6)
    with cache:
        value = CALLS[call](params)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    reuse = ReuseLinearOutputs(cache.outputs or [])
    with reuse:
        again = CALLS[call](leaves)
    assert reuse.outputs_fit
    assert torch.equal(again, value)
    grads = [
        torch.autograd.grad(out.sin().sum(), [leaves["x"], leaves["w"], leaves["b"], leaves["row"]], allow_unused=True)
        for out in (again, CALLS[call](leaves))
    ]
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


class Doubled(torch.autograd.Function):
    """2 x w^T by a linear map that ``torch.func`` hides from modes, and a graph does not."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return 2 * F.linear(x, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return 2 * g @ w, 2 * (g.mT @ x).reshape(-1, *w.shape).sum(0)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dw: Tensor) -> Tensor:
        x, w = ctx.saved_tensors
        return 2 * (dx @ w.T + x @ dw.T)


def hiding(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return logits (B, T, 5) of maps of one shape, so that outputs of others would fit."""
    x = F.linear(F.embedding(input_ids, params["w"]).cumsum(1).tanh(), params["w"], params["b"])
    return F.linear(Doubled.apply(x.tanh(), params["w"]).tanh(), params["w"])


def test_token_jvp_ignores_cache_of_custom_function() -> None:
    params = {name: p for name, p in weights().items() if name in ("w", "b")}
    batch = random_batch(torch.Generator().manual_seed(0), 3, 6, WIDTH)
    u = {name: p.flip(0) for name, p in params.items()}
    _, caches = gradient_with_cache(params, batch, hiding, memory_budget=10**9)
    assert [len(cache or []) for cache in caches] == [3]
    plain, cached = token_jvp(params, u, batch, hiding), token_jvp(params, u, batch, hiding, caches=caches)
    for ours, theirs in zip(cached, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=BOUND * float(theirs.abs().max()))


def test_outputs_fit_only_their_forward() -> None:
    x, w = torch.ones(2, WIDTH), torch.eye(WIDTH)
    for calls, outputs in ((2, 1), (1, 2), (0, 1)):
        reuse = ReuseLinearOutputs([torch.ones(2, WIDTH)] * outputs)
        with reuse:
            for _ in range(calls):
                F.linear(x, w)
        assert not reuse.outputs_fit
    mode = ForwardMode([torch.ones(3, WIDTH)])
    with mode:
        assert torch.equal(F.linear(x, w), x)
    assert not mode.outputs_fit


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_reweighted_gradient_recomputes_when_outputs_misfit(chunk_size: int | None) -> None:
    """A forward that calls more linear maps under a graph than without one."""

    def apply(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = F.embedding(input_ids, params["w"]).cumsum(1)
        once = F.linear(x, params["w"]) if torch.is_grad_enabled() else (x @ params["w"].T)
        return F.linear(once.tanh(), params["w"], params["b"])

    params = {name: p for name, p in weights().items() if name in ("w", "b")}
    batch = random_batch(torch.Generator().manual_seed(0), 4, 6, WIDTH)

    def coefficients_fn(values: TokenValues) -> Batch:
        return batch

    expected = batch_gradient(params, batch, apply)
    for budget in (0, 4000, 10**9):
        _, grads = reweighted_gradient(params, batch, apply, coefficients_fn, 1.0, chunk_size, budget)
        for name, g in expected.items():
            ours = grads[name]
            assert ours is not None
            assert g is not None
            torch.testing.assert_close(ours, g, rtol=0, atol=BOUND * float(g.abs().max()))


def test_forward_mode_jvp_closes_level_when_model_raises() -> None:
    params = weights()

    def fails(p: Params) -> Tensor:
        F.linear(p["x"], p["w"])
        raise RuntimeError("inside the model")

    for call in (lambda: forward_mode_jvp(fails, params, params), lambda: jvp(fails, (params,), (params,))):
        with pytest.raises(RuntimeError, match="inside the model"):
            call()
        value, derivative = forward_mode_jvp(CALLS["bias"], params, params)
        torch.testing.assert_close(value, CALLS["bias"](params))
        assert derivative.abs().max() > 0
