"""The library's own forward-mode rules against torch's, with and without cached outputs of linear layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, assert_close, make_apply, random_batch
from helpers.tolerances import assert_close_to_rounding
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fx_influence.autodiff.directional import token_jvp
from fx_influence.autodiff.gradients import batch_gradient, gradient_with_cache
from fx_influence.policy.modes.forward_ad import forward_mode_jvp
from fx_influence.policy.modes.linear_cache import LinearOutputCache, ReuseLinearOutputs
from fx_influence.types import Apply, Batch


def random_tensors(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 5), (4, 5), (4,)))
    return x, w, b


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_linear_jvp_matches_torch(moving: tuple[int, ...], bias: bool, cached: bool) -> None:
    if not bias and 2 in moving:
        moving = tuple(k for k in moving if k != 2) or (0,)
    point, tensors = random_tensors(0), random_tensors(1)

    def f(p: dict[str, Tensor]) -> Tensor:
        x, w, b = (p.get(str(k), point[k]) for k in range(3))
        return F.linear(x, w, b if bias else None).sin()

    params, tangents = ({str(k): x[k] for k in moving} for x in (point, tensors))
    expected = jvp(f, (params,), (tangents,))
    cache = LinearOutputCache(10**6)
    with cache:
        f(params)
    actual = forward_mode_jvp(f, params, tangents, cache.outputs if cached else None)
    for value, wanted in zip(actual, expected, strict=True):
        assert_close(value, wanted)


def test_forward_mode_jvp_uses_cached_outputs() -> None:
    x, w, _ = random_tensors(0)
    known = torch.full((2, 3, 4), 7.0, dtype=torch.float64)
    value, derivative = forward_mode_jvp(lambda p: F.linear(x, p["w"]), {"w": w}, {"w": torch.ones_like(w)}, [known])
    assert (value == 7).all()
    assert_close(derivative, x.sum(-1, keepdim=True).expand(2, 3, 4))


SCALED = torch.tensor(3.0, dtype=torch.float64)
FACTORS = {
    "two tensors": lambda x, w, b: (x * w[0]) * b[:1],
    "one of one column": lambda x, w, b: x * x.square().mean(-1, keepdim=True).rsqrt(),
    "numbers": lambda x, w, b: 2.0 * x * 0.5 * w[0] * 3,
    "a tensor without dimensions": lambda x, w, b: x * SCALED * w[0],
    "one that stays put": lambda x, w, b: torch.arange(5) * x * torch.ones(1, 3, 1),
    "two precisions": lambda x, w, b: x.float() * w[0] * x.half() * b[0].bfloat16(),
    "a square": lambda x, w, b: x * x,
    "changed in place": lambda x, w, b: (x * w[0]).add_(1).mul_(x),
}


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("case", FACTORS)
def test_product_jvp_matches_torch(case: str, moving: tuple[int, ...]) -> None:
    point, tensors = random_tensors(0), random_tensors(1)

    def f(p: dict[str, Tensor]) -> Tensor:
        return FACTORS[case](*(p.get(str(k), point[k]) for k in range(3)))

    params, tangents = ({str(k): x[k] for k in moving} for x in (point, tensors))
    expected = jvp(f, (params,), (tangents,))
    for value, wanted in zip(forward_mode_jvp(f, params, tangents), expected, strict=True):
        assert value.dtype == wanted.dtype
        assert_close(value, wanted)


def test_forward_mode_makes_no_zero_tangents() -> None:
    x, w, b = random_tensors(0)
    seen = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watched():
        forward_mode_jvp(lambda p: F.linear(p["x"] * b[:1], w) * 2.0, {"x": x}, {"x": x})
    assert seen.count("aten.mm.default") == 2
    assert not any("zeros" in name for name in seen)


@pytest.mark.parametrize(("max_bytes", "stored"), [(0, None), (95, None), (96 * 2, 1), (96 * 4, 2)])
def test_linear_output_cache_stores_all_or_nothing(max_bytes: int, stored: int | None) -> None:
    """One output is 2 x 3 x 4 float64, 192 bytes."""
    x, w, _ = random_tensors(0)
    cache = LinearOutputCache(max_bytes)
    with cache:
        for _ in range(stored or 1):
            F.linear(x, w)
    assert (None if cache.outputs is None else len(cache.outputs)) == stored
    assert cache.bytes == 192 * (stored or 0)
    with cache:
        F.linear(x, w)
        F.linear(x, w)
    assert cache.outputs is None
    assert cache.bytes == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("constant", [None, 0, 1])
def test_reuse_linear_outputs_has_no_products(constant: int | None, bias: bool) -> None:
    point = [x if k == constant else x.requires_grad_() for k, x in enumerate(random_tensors(0))]
    leaves = [x for x in point[: 2 + bias] if x.requires_grad]

    def f() -> Tensor:
        x, w, b = point
        return F.linear(F.linear(x, w, b if bias else None).sin(), w[:, :4]).cos()

    cache = LinearOutputCache(10**6)
    with cache:
        first = f()
    expected = torch.autograd.grad(first.square().sum(), leaves)
    assert cache.outputs is not None
    with FlopCounterMode(display=False) as counter, ReuseLinearOutputs(cache.outputs):
        again = f()
    assert counter.get_total_flops() == 0
    assert torch.equal(again, first)
    for value, wanted in zip(torch.autograd.grad(again.square().sum(), leaves), expected, strict=True):
        assert_close(value, wanted)


def test_reuse_linear_outputs_recomputes_under_autocast() -> None:
    x, w = (a.float() for a in random_tensors(0)[:2])
    cache = LinearOutputCache(10**6)
    with torch.autocast("cpu", torch.bfloat16):
        with cache:
            first = F.linear(x, w.requires_grad_())
        with ReuseLinearOutputs(cache.outputs or []):
            again = F.linear(x, w)
    assert again.dtype == torch.bfloat16
    again.sum().backward()
    assert w.grad is not None
    assert_close_to_rounding(w.grad, torch.autograd.grad(first.sum(), w)[0], terms=len(x), dtype=torch.bfloat16)


@pytest.mark.parametrize("fit", [0, 1, 3])
def test_any_number_of_caches_gives_same_derivatives(fit: int) -> None:
    apply, params = make_apply(TinyPolicy(11, 6, 2, 2, 7))
    batch = random_batch(torch.Generator().manual_seed(0), 5, 7, 11)
    tangent = {name: torch.randn_like(p) for name, p in params.items()}
    every = gradient_with_cache(params, batch, apply, 1.0, 2, 10**8)[1]
    sizes = [sum(x.numel() * x.element_size() for x in cache or []) for cache in every]
    g, caches = gradient_with_cache(params, batch, apply, 1.0, 2, sum(sizes[:fit]))
    assert [cache is not None for cache in caches] == [k < fit for k in range(3)]
    for name, value in batch_gradient(params, batch, apply, chunk_size=2).items():
        assert value is not None
        actual = g[name]
        assert actual is not None
        assert_close(actual, value, value.abs().max())
    plain, cached = (token_jvp(params, tangent, batch, apply, 1.0, 2, outputs) for outputs in (None, caches))
    for value, wanted in zip(cached, plain, strict=True):
        assert_close(value, wanted)


def test_linear_output_cache_drops_changed_outputs() -> None:
    x, w, _ = random_tensors(0)
    cache = LinearOutputCache(10**6)
    with cache:
        F.linear(x, w).add_(1)
    assert cache.outputs is None


def drawn_tree(dtype: torch.dtype) -> tuple[dict[str, Tensor], Batch]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"e": (11, 4), "a": (4, 4), "s": (4,), "b": (11, 4)}
    params = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    return params, random_batch(generator, 5, 7, 11)


def rowwise(p: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """Apply some linear maps inside a vmap, and some outside."""
    x = vmap(lambda row: F.linear(p["e"][row].cumsum(0), p["a"]).tanh() * p["s"])(ids)
    return F.linear(x, p["b"])


def nested(p: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    x = p["e"][ids].cumsum(1)
    return F.linear(jvp(lambda x: F.linear(x, p["a"]).sin() * p["s"], (x,), (x,))[1], p["b"])


@pytest.mark.parametrize("apply", [rowwise, nested])
def test_token_jvp_supports_policies_with_transforms(apply: Apply) -> None:
    params, batch = drawn_tree(torch.float64)
    tangent = {name: p.cos() for name, p in params.items()}
    gradient, caches = gradient_with_cache(params, batch, apply, memory_budget=10**8)
    assert caches[0]
    derivatives = token_jvp(params, tangent, batch, apply, caches=caches)
    assert batch.coefficients is not None
    loss = -(batch.coefficients * derivatives.logprobs).sum()
    if batch.entropy_coefficients is not None:
        loss = loss - (batch.entropy_coefficients * derivatives.entropies).sum()
    assert_close(loss, torch.stack([(g * tangent[name]).sum() for name, g in gradient.items() if g is not None]).sum())


def half(p: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = F.linear(p["e"][ids], p["a"]).unsqueeze(1)
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True).squeeze(1)
        return F.linear(x * p["s"], p["b"])


def test_token_jvp_supports_policies_with_autocast() -> None:
    params, batch = drawn_tree(torch.float32)
    gradient, caches = gradient_with_cache(params, batch, half, memory_budget=10**8)
    direction = {name: g for name, g in gradient.items() if g is not None}
    assert batch.coefficients is not None
    for outputs in (None, caches):
        derivative = -(batch.coefficients * token_jvp(params, direction, batch, half, caches=outputs).logprobs).sum()
        # Three products in bfloat16, forward and back.
        assert_close_to_rounding(
            derivative, sum(g.square().sum() for g in direction.values()), terms=3, dtype=torch.bfloat16
        )
