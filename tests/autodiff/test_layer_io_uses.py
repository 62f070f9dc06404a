"""Per-row gradients are those of a loop over rows, however a weight is used and in whatever order tokens come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cases import random_adamw_state, random_batch
from torch import Tensor
from torch.nn import functional as F

import fx_influence as fx
from fx_influence.autodiff.gram import gradient_gram
from fx_influence.autodiff.layer_io.support import supported_names
from fx_influence.types import Apply, Batch, Params

VOCAB, WIDTH = 9, 6
BOUND = 2**10 * torch.finfo(torch.float64).eps
"""Relative to the largest value: float64 rounds each of fewer than 2**8 terms, with a margin for their signs."""

Middle = Callable[[Params, Tensor, Tensor], Tensor]


def parameters(**shapes: tuple[int, ...]) -> Params:
    generator = torch.Generator().manual_seed(5)
    shapes = {"embed": (VOCAB, WIDTH), "head": (VOCAB, WIDTH), **shapes}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def policy(middle: Middle) -> Apply:
    def apply(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = F.embedding(input_ids, params["embed"]).cumsum(1)
        return F.linear(torch.tanh(x + middle(params, x, attention_mask)), params["head"])

    return apply


def batch_of(rows: int, width: int = 7, seed: int = 0, **options: Any) -> Batch:
    return random_batch(torch.Generator().manual_seed(seed), rows, width, VOCAB, **options)


def looped(apply: Apply, params: Params, batch: Batch) -> Tensor:
    """Return the gradient of each row's loss (B, P) from one forward of the batch and one reverse pass per row."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    log_pi = apply(leaves, batch.input_ids, batch.attention_mask)[:, :-1].log_softmax(-1)
    taken = log_pi.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    assert batch.coefficients is not None
    rows = []
    for loss in -(batch.coefficients[:, 1:] * taken).sum(1):
        grads = torch.autograd.grad(
            loss, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def assert_rows_equal(apply: Apply, params: Params, batch: Batch) -> None:
    """Check the Gram matrix and the influences without a JVP against the gradients of the loop."""
    g = looped(apply, params, batch)
    ones = {name: torch.ones_like(p) for name, p in params.items()}
    gram = gradient_gram(params, batch, batch, ones, apply)
    torch.testing.assert_close(gram, g @ g.T, rtol=0, atol=BOUND * float(g.square().sum(1).max()))
    state = random_adamw_state(torch.Generator().manual_seed(1), params)
    fast, by_jvp = (
        fx.influence(params, batch, batch, state, apply=apply, per_token=per_token, stderr=False)
        for per_token in (False, True)
    )
    scale = float(by_jvp.per_sequence.abs().sum())
    torch.testing.assert_close(fast.per_sequence, by_jvp.per_sequence, rtol=0, atol=BOUND * scale)


def time_first(p: Params, x: Tensor, mask: Tensor) -> Tensor:
    rows, width, dim = x.shape
    flat = x.transpose(0, 1).contiguous().view(width * rows, dim)
    return F.linear(flat, p["w"]).view(width, rows, dim).transpose(0, 1)


def heads_first(p: Params, x: Tensor, mask: Tensor) -> Tensor:
    by_head = x.unflatten(-1, (3, 2)).permute(2, 0, 1, 3)
    return F.linear(by_head, p["v"]).permute(1, 2, 0, 3).flatten(2)


def by_length(p: Params, x: Tensor, mask: Tensor) -> Tensor:
    order = mask.sum(1).argsort(stable=True)
    return F.linear(x[order], p["w"])[order.argsort()]


def rows_reversed(p: Params, x: Tensor, mask: Tensor) -> Tensor:
    return (x.flip(0) * p["s"]).flip(0)


def tokens_gathered(p: Params, x: Tensor, mask: Tensor) -> Tensor:
    order = torch.arange(len(x) * x.shape[1]).flip(0)
    return F.linear(x.reshape(-1, WIDTH)[order].view(-1, WIDTH), p["w"])[order].view(x.shape)


ORDERS: dict[str, tuple[Middle, dict[str, tuple[int, ...]]]] = {
    "time_first": (time_first, {"w": (WIDTH, WIDTH)}),
    "positions_first": (lambda p, x, mask: F.linear(x.mT.mT.transpose(0, 1), p["w"]).transpose(0, 1), {"w": (6, 6)}),
    "heads_first": (heads_first, {"v": (2, 2)}),
    "by_length": (by_length, {"w": (WIDTH, WIDTH)}),
    "rows_reversed": (rows_reversed, {"s": (WIDTH,)}),
    "tokens_gathered": (tokens_gathered, {"w": (WIDTH, WIDTH)}),
}


@pytest.mark.parametrize(("rows", "width"), [(3, 7), (4, 4), (3, 3), (7, 6)])
@pytest.mark.parametrize("order", [name for name in ORDERS if name != "by_length"])
def test_row_gradients_are_exact_in_any_token_order(order: str, rows: int, width: int) -> None:
    middle, shapes = ORDERS[order]
    params, batch = parameters(**shapes), batch_of(rows, width)
    assert supported_names(params, batch, policy(middle)) == {"embed", "head"}
    assert_rows_equal(policy(middle), params, batch)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_row_gradients_are_exact_when_rows_are_sorted(padding: Any) -> None:
    """``vmap`` has no row to sort by, so only the decision is compared."""
    middle, shapes = ORDERS["by_length"]
    params, batch = parameters(**shapes), batch_of(5, padding=padding)
    assert supported_names(params, batch, policy(middle)) == {"embed", "head"}
    assert_rows_equal(policy(middle), params, batch)


class Scaled(torch.autograd.Function):
    """Product x w^T by a custom function, so that no torch function is passed the weight."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g @ w, (g.mT @ x).reshape(-1, *w.shape).sum(0)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dw: Tensor) -> Tensor:
        x, w = ctx.saved_tensors
        return dx @ w.T + x @ dw.T

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, w: Tensor) -> Any:
        return torch.func.vmap(F.linear, in_dims)(x, w), 0


USES: dict[str, Callable[[Params, Tensor], Tensor]] = {
    "T": lambda p, x: x @ p["w"].T,
    "t": lambda p, x: x @ p["w"].t(),
    "mT": lambda p, x: x @ p["w"].mT,
    "transpose": lambda p, x: torch.matmul(x, p["w"].transpose(0, 1)),
    "slice": lambda p, x: F.linear(x, p["w"][:3]).repeat(1, 1, 2),
    "row": lambda p, x: x * p["w"][0],
    "view": lambda p, x: x * p["w"].view(-1)[:WIDTH],
    "diagonal": lambda p, x: x * p["w"].diagonal(),
    "unbind": lambda p, x: x * p["w"].unbind()[2],
    "alias": lambda p, x: F.linear(x, p["w"].view_as(p["w"])),
    "list": lambda p, x: F.linear(x, torch.cat([p["w"], p["w"]])[3:9]),
    "tuple": lambda p, x: F.linear(x, torch.stack((p["w"], 2 * p["w"])).sum(0)),
    "keyword": lambda p, x: torch.matmul(input=x, other=p["w"]),
    "einsum": lambda p, x: torch.einsum("btd,ed->bte", x, p["w"]),
    "multi_dot": lambda p, x: torch.linalg.multi_dot([x.reshape(-1, WIDTH), p["w"], p["w"]]).view(x.shape),
    "as_input": lambda p, x: x + F.linear(p["w"], p["w"]).sum(0),
    "custom_function": lambda p, x: Scaled.apply(x, p["w"]),
    "from_the_left": lambda p, x: (p["w"] @ x.mT).mT,
    "one_plus": lambda p, x: x * (1 + p["w"][1]),
    "norm": lambda p, x: F.rms_norm(x, (WIDTH,), p["w"][0]),
    "convolution": lambda p, x: F.conv1d(x.mT, p["w"][:, :, None]).mT,
}


@pytest.mark.parametrize("use", USES)
def test_row_gradients_are_exact_for_unsupported_uses(use: str) -> None:
    def middle(p: Params, x: Tensor, mask: Tensor) -> Tensor:
        return F.linear(x, p["w"]) + USES[use](p, x)

    params, batch = parameters(w=(WIDTH, WIDTH)), batch_of(4)
    assert supported_names(params, batch, policy(middle)) == {"embed", "head"}
    assert_rows_equal(policy(middle), params, batch)


TIES: dict[str, Apply] = {
    "head_by_T": lambda p, ids, mask: F.embedding(ids, p["embed"]).cumsum(1).tanh() @ p["embed"].T,
    "head_by_einsum": lambda p, ids, mask: torch.einsum(
        "btd,vd->btv", F.embedding(ids, p["embed"]).cumsum(1).tanh(), p["embed"]
    ),
    "table_by_index": lambda p, ids, mask: F.linear(p["embed"][ids].cumsum(1).tanh(), p["embed"]),
    "head_by_keyword": lambda p, ids, mask: F.linear(
        weight=p["embed"], input=F.embedding(weight=p["embed"], input=ids).cumsum(1).tanh()
    ),
}


@pytest.mark.parametrize("tie", TIES)
def test_row_gradients_are_exact_for_tied_weights(tie: str) -> None:
    params = {"embed": parameters()["embed"]}
    supported = {"embed"} if tie == "head_by_keyword" else set()
    assert supported_names(params, batch_of(4), TIES[tie]) == supported
    assert_rows_equal(TIES[tie], params, batch_of(4))


KEYWORDS: dict[str, Callable[[Params, Tensor], Tensor]] = {
    "linear": lambda p, x: F.linear(bias=p["s"], weight=p["w"], input=x),
    "linear_in_part": lambda p, x: F.linear(x, weight=p["w"], bias=p["s"]),
    "layer_norm": lambda p, x: F.linear(
        F.layer_norm(bias=p["s"], input=x, normalized_shape=(WIDTH,), weight=p["s"]), p["w"]
    ),
    "no_bias": lambda p, x: F.linear(F.layer_norm(x, (WIDTH,), weight=p["s"], bias=None), bias=None, weight=p["w"]),
}


@pytest.mark.parametrize("call", KEYWORDS)
def test_row_gradients_are_exact_for_keyword_arguments(call: str) -> None:
    params, batch = parameters(w=(WIDTH, WIDTH), s=(WIDTH,)), batch_of(4)
    apply = policy(lambda p, x, mask: KEYWORDS[call](p, x))
    assert supported_names(params, batch, apply) == params.keys()
    assert_rows_equal(apply, params, batch)


def test_supported_names_excludes_overwritten_inputs() -> None:
    def middle(p: Params, x: Tensor, mask: Tensor) -> Tensor:
        z = x + 0
        y = F.linear(z, p["w"])
        return y + z.mul_(0.5)

    params, batch = parameters(w=(WIDTH, WIDTH)), batch_of(4)
    frozen = {name: params.pop(name) for name in ("embed", "head")}

    def apply(p: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return policy(middle)({**frozen, **p}, input_ids, attention_mask)

    assert supported_names(params, batch, apply) == set()


def test_supported_names_excludes_uses_inside_vmap() -> None:
    def middle(p: Params, x: Tensor, mask: Tensor) -> Tensor:
        return torch.func.vmap(lambda heads: F.linear(heads, p["v"]), -1, -1)(x.unflatten(-1, (2, 3))).flatten(2)

    params, batch = parameters(v=(2, 2)), batch_of(3)
    assert supported_names(params, batch, policy(middle)) == {"embed", "head"}
    assert_rows_equal(policy(middle), params, batch)
