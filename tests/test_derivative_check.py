"""Wrong derivatives are refused and their parameters named; kinks of a function are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, random_batch
from helpers.tiny_models import AttentionModel, full_batch, make_float64
from torch import Tensor, nn
from torch.nn import functional as F

import fx_influence as fx
from fx_influence.core.tree import random_direction
from fx_influence.derivative_check import MIN_JUDGED


class Squared(torch.autograd.Function):
    """x^2, whose derivative in each mode is a factor times x; subclasses make the factors wrong."""

    generate_vmap_rule = True
    backward_factor, jvp_factor = 2.0, 2.0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @classmethod
    def backward(cls, ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return cls.backward_factor * ctx.saved_tensors[0] * grad

    @classmethod
    def jvp(cls, ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return cls.jvp_factor * ctx.saved_tensors[0] * tangent


class WrongBackward(Squared):
    backward_factor = 1.9


class WrongJvp(Squared):
    jvp_factor = 1.9


class WrongBoth(Squared):
    backward_factor, jvp_factor = 1.9, 1.9


class StraightThrough(Squared):
    """Rounding, with the derivative of the identity."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round(decimals=1)

    @classmethod
    def backward(cls, ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clone()

    @classmethod
    def jvp(cls, ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return tangent.clone()


def without_graph(x: Tensor) -> Tensor:
    with torch.no_grad():
        size = x.square().mean(-1, keepdim=True)
    return x / (size + 1).sqrt()


def top_two(x: Tensor) -> Tensor:
    return torch.where(x >= x.topk(2, -1).values[..., -1:], x, 0.0)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "backward": WrongBackward.apply,
    "jvp": WrongJvp.apply,
    "both": WrongBoth.apply,
    "straight through": StraightThrough.apply,
}
SEEN_BY_THE_LIBRARY: dict[str, Callable[[Tensor], Tensor]] = {
    "no_grad": without_graph,
    "detach": lambda x: x / (x.detach().square().mean(-1, keepdim=True) + 1).sqrt(),
    "straight through": lambda x: x + (x.round(decimals=1) - x).detach(),
}
RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "custom": Squared.apply,
    "relu": F.relu,
    "clamp": lambda x: x.clamp(-0.3, 0.3),
    "routing": top_two,
}


class Mixing(AttentionModel):
    """A linear map and ``operation`` on it beside the stream."""

    def __init__(self, operation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.operation, self.first = operation, nn.Linear(8, 8)

    def transform_stream(self, x: Tensor) -> Tensor:
        return x + self.operation(self.first(x))


UPSTREAM = {"first.weight", "first.bias", "token.weight", "position.weight"}


def policy(operation: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> tuple[fx.Apply, fx.Params]:
    return fx.make_functional(make_float64(Mixing, operation=operation).to(dtype))


def function(operation: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> tuple[fx.Apply, fx.Params]:
    model = make_float64(Mixing, operation=operation)
    params = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    return lambda p, ids, mask: torch.func.functional_call(model, p, (ids, mask)), params


BATCH = full_batch(2, rows=4)


@pytest.mark.parametrize("make_apply", [policy, function])
@pytest.mark.parametrize("kind", WRONG)
def test_check_derivatives_names_affected_parameters(kind: str, make_apply: Callable[..., Any]) -> None:
    apply, params = make_apply(WRONG[kind])
    mode = "gradient" if kind == "backward" else "JVP"
    with pytest.raises(
        fx.DerivativeError, match=rf"apply has a {mode} that is .* off .*; expected at most .*repair"
    ) as e:
        fx.check_derivatives(params, BATCH, apply=apply)
    assert e.value.check is not None
    assert set(e.value.check.parameters) == UPSTREAM
    assert e.value.check.conclusive


@pytest.mark.parametrize("kind", SEEN_BY_THE_LIBRARY)
def test_check_derivatives_refuses_a_function_that_detaches(kind: str) -> None:
    apply, params = function(SEEN_BY_THE_LIBRARY[kind])
    with pytest.raises(fx.DerivativeError, match=r"JVP"):
        fx.check_derivatives(params, BATCH, apply=apply)
    # A policy's derivatives over E are the function's whatever it detaches.
    apply, params = policy(SEEN_BY_THE_LIBRARY[kind])
    assert fx.check_derivatives(params, BATCH, apply=apply).conclusive


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_check_derivatives_names_the_one_detached_parameter(dtype: torch.dtype) -> None:
    model = make_float64(Mixing)

    def apply(p: fx.Params, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.func.functional_call(model, {**p, "qkv.weight": p["qkv.weight"].detach()}, (ids, mask))

    params = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    with pytest.raises(fx.DerivativeError, match=r"along 'qkv.weight'; ") as e:
        fx.check_derivatives(params, BATCH, apply=apply, dtype=dtype)
    assert e.value.check is not None
    assert e.value.check.parameters == ("qkv.weight",)
    others = {name: v for name, v in random_direction(params, 1).items() if name not in ("qkv.weight", "head.bias")}
    assert fx.check_derivatives(params, BATCH, apply=apply, dtype=dtype, direction=others).conclusive


@pytest.mark.parametrize("make_apply", [policy, function])
def test_check_derivatives_refuses_policy_without_derivative(make_apply: Callable[..., Any]) -> None:
    apply, params = make_apply(lambda x: torch.from_numpy(x.detach().numpy() ** 2))
    with pytest.raises(fx.DerivativeError, match=r"apply has no (JVP|gradient) .*differentiate in both modes") as e:
        fx.check_derivatives(params, BATCH, apply=apply)
    assert e.value.check is None


@pytest.mark.parametrize("make_apply", [policy, function])
@pytest.mark.parametrize("kind", RIGHT)
def test_check_derivatives_passes_kinks_and_switches(kind: str, make_apply: Callable[..., Any]) -> None:
    apply, params = make_apply(RIGHT[kind])
    check = fx.check_derivatives(params, BATCH, apply=apply)
    assert check.deviation <= check.bound
    assert check.parameters == ()
    assert check.conclusive


def test_check_derivatives_judges_nothing_at_a_kink_itself() -> None:
    """Given slopes of a and b on both sides, the central difference is (a + b) / 2 at every step."""
    generator = torch.Generator().manual_seed(0)
    params = {"table": torch.randn(7, 7, generator=generator).double(), "bias": torch.zeros(7, dtype=torch.float64)}
    batch = random_batch(generator, 4, 6, 7, coefficients=False)
    check = fx.check_derivatives(params, batch, apply=lambda p, ids, mask: p["table"][ids] + F.relu(p["bias"]))
    assert not check.conclusive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_apply", [policy, function])
def test_check_derivatives_passes_in_lower_precision(dtype: torch.dtype, make_apply: Callable[..., Any]) -> None:
    apply, params = make_apply(F.relu, dtype)
    for precision in (torch.float32, torch.float64):
        check = fx.check_derivatives(params, BATCH, apply=apply, dtype=precision)
        assert check.deviation <= check.bound
        assert check.conclusive


@pytest.mark.parametrize("seed", range(5))
def test_check_derivatives_passes_a_transformer(seed: int) -> None:
    apply, params = fx.make_functional(TinyPolicy(7, 6, 2, 2, 6, seed=seed))
    batch = random_batch(torch.Generator().manual_seed(seed), 4, 6, 7, coefficients=False)
    assert fx.check_derivatives(params, batch, apply=apply, seed=seed).judged == 1.0
    assert fx.check_derivatives(params, batch, apply=apply, seed=seed, dtype=torch.float32).judged > MIN_JUDGED


def test_check_derivatives_passes_adapters_with_a_zero_factor() -> None:
    def apply(p: fx.Params, ids: Tensor, mask: Tensor) -> Tensor:
        return table.to(p["a"].dtype)[ids] @ (torch.eye(7, dtype=p["a"].dtype) + p["b"] @ p["a"])

    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 7, generator=generator)
    params = {"a": torch.randn(2, 7, generator=generator), "b": torch.zeros(7, 2)}
    batch = random_batch(generator, 4, 6, 7, coefficients=False)
    assert fx.check_derivatives(params, batch, apply=apply).judged == 1.0


def test_check_derivatives_is_inconclusive_if_nothing_is_judged() -> None:
    apply, params = function(lambda x: x.round(decimals=2))
    check = fx.check_derivatives({n: p.float() for n, p in params.items()}, BATCH, apply=apply, dtype=torch.float32)
    assert not check.conclusive
    unmoved = fx.check_derivatives(params, BATCH, apply=apply, direction={})
    assert unmoved.judged == 0
    assert math.isnan(unmoved.deviation)


def test_check_derivatives_refuses_a_direction_of_other_names() -> None:
    apply, params = policy(F.relu)
    with pytest.raises(ValueError, match=r"'other'.*Pass a direction made from these parameters"):
        fx.check_derivatives(params, BATCH, apply=apply, direction={"other": torch.ones(1)})
    with pytest.raises(ValueError, match=r"NaN or infinity; expected a finite direction"):
        fx.check_derivatives(params, BATCH, apply=apply, direction={"first.bias": torch.full((8,), math.nan)})
