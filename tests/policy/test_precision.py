"""Weights in half precision are computed with in float32, and rounding that rivals the influences is never silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers.cases import TinyPolicy, random_adamw_state, random_batch
from helpers.present import present
from helpers.tolerances import TINY_POLICY, assert_within, rounding_bound
from torch import Tensor, nn
from torch.nn import functional as F

import fx_influence as fx
from fx_influence.estimators.consistency import check_rounding

VOCAB, WIDTH = 7, 6
HALF = [torch.bfloat16, torch.float16]


class Mixed(nn.Module):
    """Weights that an adapter corrects, in a dtype of their own, as LoRA over a model in half precision."""

    def __init__(self, base: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)

        def random_parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.table, self.head = random_parameter(VOCAB, 8), random_parameter(VOCAB, 8)
        self.up, self.down = random_parameter(2, 8), random_parameter(8, 2)
        for p in (self.table, self.head):
            p.requires_grad_(False)
            p.data = p.data.to(base)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = F.embedding(input_ids, self.table)
        x = x + F.linear(F.linear(x.to(self.up.dtype), self.up).tanh(), self.down).to(x.dtype)
        return F.linear(x, self.head)


class Problem(NamedTuple):
    """A policy whose weights are stored in half precision, and the very same weights in float64."""

    low: tuple[fx.Apply, fx.Params]
    exact: tuple[fx.Apply, fx.Params]
    u: fx.Batch
    e: fx.Batch
    state: fx.AdamWState


def problem(kind: str, dtype: torch.dtype) -> Problem:
    def make_module() -> nn.Module:
        return Mixed(dtype) if kind == "frozen" else TinyPolicy(VOCAB, 6, 1, 2, WIDTH, seed=2).to(dtype)

    low: tuple[fx.Apply, fx.Params] = fx.make_functional(make_module())
    exact: tuple[fx.Apply, fx.Params] = fx.make_functional(make_module().double())
    if kind == "function":
        low, exact = ((lambda p, ids, mask, a=apply: a(p, ids, mask), params) for apply, params in (low, exact))
    generator = torch.Generator().manual_seed(5)
    u = random_batch(generator, 5, WIDTH, VOCAB)
    e = random_batch(generator, 8, WIDTH, VOCAB, groups=4, coefficients=False)
    return Problem(low, exact, u, e, random_adamw_state(generator, exact[1]))


def direction(p: Problem) -> fx.Params:
    generator = torch.Generator().manual_seed(6)
    return {name: torch.randn(x.shape, generator=generator).double() for name, x in p.exact[1].items()}


def row_gradients(apply: fx.Apply, params: fx.Params, p: Problem) -> Tensor:
    grads = fx.per_sample_grads(fx.rollout_loss(apply), params, p.u)
    return torch.cat([g.flatten(1) for g in grads.values()], 1)


FUNCTIONS: dict[str, Callable[[fx.Apply, fx.Params, Problem], Tensor | None]] = {
    "influence": lambda a, w, p: fx.influence(w, p.u, p.e, p.state, apply=a).per_token,
    "influence, no error bars": lambda a, w, p: fx.influence(w, p.u, p.e, p.state, apply=a, stderr=False).per_token,
    "influence, products": lambda a, w, p: fx.influence(w, p.u, p.e, p.state, apply=a, per_token=False).per_sequence,
    "influence, matrix": lambda a, w, p: fx.influence(w, p.u, p.e, p.state, apply=a, matrix=True).matrix,
    "jvp_delta": lambda a, w, p: fx.jvp_delta(w, direction(p), p.e, apply=a).contributions,
    "curvature": lambda a, w, p: fx.jvp_delta(w, direction(p), p.e, apply=a).second,
    "snis_delta": lambda a, w, p: fx.snis_delta(w, direction(p), 0.1, p.e, apply=a).contributions,
    "fisher_kernel": lambda a, w, p: fx.fisher_kernel(w, p.u, p.e, p.state, apply=a),
    "per_sample_grads": row_gradients,
    "token_values": lambda a, w, p: fx.token_values(w, p.u, a).entropies,
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", ["trained", "frozen", "function"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_weights_match_float64(name: str, kind: str, dtype: torch.dtype) -> None:
    """The bound is float32's, 7e-5 of the largest value; in the weights' own precision the error is above 1e-3."""
    p = problem(kind, dtype)
    expected = FUNCTIONS[name](*p.exact, p)
    actual = FUNCTIONS[name](*p.low, p)
    assert expected is not None
    # What cancels in one entry is of the size of the others.
    assert_within(actual, expected, rounding_bound(torch.float32, TINY_POLICY, expected.abs().sum()), name)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_weights_satisfy_float32_identity(dtype: torch.dtype) -> None:
    p = problem("trained", dtype)
    out = fx.influence(p.low[1], p.u, p.e, p.state, apply=p.low[0], stderr=False)
    size = out.per_sequence.abs().sum()
    bound = rounding_bound(torch.float32, TINY_POLICY, size)
    assert out.residual.abs() <= bound
    assert out.rounding.sum() <= bound, "computed for half precision even without error bars"
    assert {x.dtype for x in p.low[1].values()} == {dtype}, "nothing that was given is changed"


def test_in_float32_warns_of_function_fixed_to_half() -> None:
    p, generator = problem("trained", torch.bfloat16), torch.Generator().manual_seed(1)
    params = {k: torch.randn(VOCAB, VOCAB, generator=generator).bfloat16() for k in "wv"}
    constant = torch.randn(VOCAB, VOCAB, generator=generator).bfloat16()

    def apply(params: fx.Params, ids: Tensor, mask: Tensor) -> Tensor:
        return F.linear(F.linear(F.embedding(ids, params["w"]), constant), params["v"])

    state = random_adamw_state(generator, params)
    with pytest.warns(UserWarning, match=r"params are torch.bfloat16 and apply takes them in no other precision"):
        out = fx.influence(params, p.u, p.e, state, apply=apply, tolerance=float("inf"))
    assert out.rounding.sum() > rounding_bound(torch.float32, TINY_POLICY, out.per_sequence.abs().sum())
    with pytest.raises(ValueError, match=r"takes them in no other precision.*Let apply cast"):
        fx.snis_delta(params, {}, 1e-3, p.e, apply=apply)


@pytest.mark.parametrize(("share", "outcome"), [(0.05, None), (0.2, "warned"), (1.5, "refused")])
def test_check_rounding_reports_rounding_as_large_as_influence(share: float, outcome: str | None, recwarn: Any) -> None:
    delta = torch.tensor([1.0, -3.0], dtype=torch.float64)
    rounding = torch.tensor([torch.nan, 4 * share], dtype=torch.float64)
    if outcome == "refused":
        with pytest.raises(fx.IdentityError, match=r"rounding is 1.5 of the sum of \|influence\|.*torch.bfloat16"):
            check_rounding(rounding, delta, torch.bfloat16, 3e-2)
        check_rounding(rounding, delta, torch.bfloat16, float("inf"))
    else:
        check_rounding(rounding, delta, torch.bfloat16, 3e-2)
    assert [str(w.message)[:8] for w in recwarn] == ([] if outcome is None else ["rounding"])


def test_check_rounding_accepts_zero_influences(recwarn: Any) -> None:
    check_rounding(torch.zeros(2), torch.zeros(2), torch.float32, 1e-4)
    assert not recwarn.list


@pytest.mark.parametrize("how", ["error bars", "matrix", "one route"])
def test_rounding_is_known_when_two_methods_run(how: str) -> None:
    p = problem("trained", torch.float32)
    out = fx.influence(p.low[1], p.u, p.e, p.state, apply=p.low[0], stderr=how == "error bars", matrix=how == "matrix")
    assert out.rounding.shape == out.per_sequence.shape
    assert bool(out.rounding.isnan().all()) == (how == "one route")
    assert not out.rounding.sum() > rounding_bound(torch.float32, TINY_POLICY, out.per_sequence.abs().sum())


class Casting(nn.Module):
    """A policy whose forward enters autocast itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyPolicy(VOCAB, 6, 1, 2, WIDTH, seed=2).float()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = self.inner(input_ids, attention_mask)
        return logits.float()


@pytest.mark.filterwarnings("ignore:rounding is")
def test_forward_that_enters_autocast_has_its_tolerance() -> None:
    apply, params = fx.make_functional(Casting())
    p = problem("trained", torch.float32)
    state = random_adamw_state(torch.Generator().manual_seed(8), params)
    for policy in (apply, lambda w, ids, mask: apply(w, ids, mask)):
        out = fx.influence(params, p.u, p.e, state, apply=policy, stderr=False)
        assert out.rounding.sum() > 0
        assert out.residual.abs() > 1e-6 * out.per_sequence.abs().sum()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 2.0**12)])
def test_autocast_applies_to_update_batch_only(dtype: torch.dtype, scale: float) -> None:
    p = problem("trained", torch.float32)
    apply, params = p.low
    assert isinstance(apply, fx.Policy)
    low = apply.with_autocast(dtype, scale)
    exact = fx.influence(params, p.u, p.e, p.state, apply=apply)
    out = fx.influence(params, p.u, p.e, p.state, apply=low)
    size = float(exact.matrix.abs().sum()) if exact.matrix is not None else float(present(exact.per_token).abs().sum())
    assert_within(present(out.per_token).sum(-1), out.per_sequence, rounding_bound(torch.float64, WIDTH, size))
    assert_within(out.per_sequence, exact.per_sequence, rounding_bound(dtype, WIDTH, size))
    assert out.rounding.sum() > exact.rounding.sum()
    assert out.baseline == pytest.approx(float(exact.baseline), rel=1e-1)
    d = direction(p)
    for measure in (
        lambda a: fx.jvp_delta(params, d, p.e, apply=a).first,
        lambda a: fx.token_values(params, p.e, a)[1],
    ):
        assert torch.equal(measure(low), measure(apply)), "of the function itself"


def test_loss_scale_preserves_tiny_float16_gradients() -> None:
    p = problem("trained", torch.float32)
    apply, params = p.low
    assert isinstance(apply, fx.Policy)
    tiny = p.u._replace(coefficients=1e-7 * present(p.u.coefficients), entropy_coefficients=None)
    exact = fx.influence(params, tiny, p.e, p.state, apply=apply, stderr=False)
    scaled = fx.influence(params, tiny, p.e, p.state, apply=apply.with_autocast(torch.float16, 2.0**20), stderr=False)
    size = present(exact.per_token).abs().sum()
    assert_within(scaled.per_sequence, exact.per_sequence, rounding_bound(torch.float16, WIDTH, size))
