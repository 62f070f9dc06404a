"""Attention in blocks against torch's own, value and derivatives, and the blocks' size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.cases import assert_close
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

from fx_influence.policy import attention
from fx_influence.policy.attention import blockwise_attention

ROWS, HEADS, T, D = 2, 4, 9, 3
Triple = tuple[Tensor, Tensor, Tensor]


def drawn(seed: int, heads: int = HEADS) -> Triple:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((ROWS, HEADS, T, D), (ROWS, heads, T, D), (ROWS, heads, T, D))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def literal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """One query at a time; ``mask`` True where a query may look."""
    k, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
    out = []
    for t in range(q.shape[2]):
        scores = (q[:, :, t : t + 1] * k).sum(-1) * (D**-0.5 if scale is None else scale)
        weight = scores if mask is None else scores.masked_fill(~mask[..., t, :], -1e9)
        out.append((weight.softmax(-1).unsqueeze(-1) * v).sum(2))
    return torch.stack(out, 2)


CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
PADDED = CAUSAL & (torch.arange(T) > 0)[None, None, None, :] | torch.eye(T, dtype=torch.bool)
CASES: dict[str, tuple[dict[str, object], Tensor | None, int]] = {
    "all": ({}, None, HEADS),
    "causal": ({"is_causal": True}, CAUSAL, HEADS),
    "causal, fewer keys than queries": ({"is_causal": True, "enable_gqa": True}, CAUSAL, 2),
    "masked": ({"attn_mask": PADDED}, PADDED, HEADS),
    "added": ({"attn_mask": torch.where(PADDED, 0.0, -1e9).double()}, PADDED, HEADS),
    "scaled": ({"attn_mask": CAUSAL, "scale": 0.3}, CAUSAL, HEADS),
}


@pytest.fixture(params=[1, 2 * ROWS * HEADS * T, 2**24], autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query at a time, two, or all."""
    monkeypatch.setattr(attention, "SCORES_PER_BLOCK", request.param)


def pair(case: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Triple, Triple]:
    options, mask, heads = CASES[case]
    scale = options.get("scale")
    assert scale is None or isinstance(scale, float)
    ours = lambda *x: blockwise_attention(*x, **options)  # noqa: E731
    return ours, lambda *x: literal(*x, mask, scale), drawn(0, heads), drawn(1, heads)


@pytest.mark.parametrize("case", CASES)
def test_values_and_all_derivatives_are_the_literal_ones(case: str) -> None:
    ours, slow, at, along = pair(case)
    assert_close(ours(*at), slow(*at))
    assert_close(jvp(ours, at, along)[1], jvp(slow, at, along)[1])
    for which in range(3):
        one = [x if k == which else torch.zeros_like(x) for k, x in enumerate(along)]
        assert_close(jvp(ours, at, tuple(one))[1], jvp(slow, at, tuple(one))[1])
        g, expected = (grad(lambda *x, f=f: f(*x).sin().sum(), which)(*at) for f in (ours, slow))
        assert_close(g, expected)
    assert_close(vmap(ours)(*(torch.stack([x, 2 * x]) for x in at))[1], slow(*(2 * x for x in at)))


def test_a_tangent_of_the_queries_alone_is_enough() -> None:
    ours, slow, (q, k, v), (dq, _, _) = pair("causal")
    assert_close(jvp(lambda q: ours(q, k, v), (q,), (dq,))[1], jvp(lambda q: slow(q, k, v), (q,), (dq,))[1])


def test_a_query_that_sees_no_key_gives_0_and_no_nan() -> None:
    mask = CAUSAL & (torch.arange(T) > 1)
    at, along = drawn(0), drawn(1)
    value, slope = jvp(lambda *x: blockwise_attention(*x, attn_mask=mask), at, along)
    assert torch.isfinite(value).all()
    assert torch.isfinite(slope).all()
    assert not value[:, :, :2].any()
    assert value[:, :, 2:].all()


def test_no_more_scores_exist_at_once_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    softmax = torch.Tensor.softmax

    def watched(x: Tensor, dim: int) -> Tensor:
        seen.append(x.numel())
        return softmax(x, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", watched)
    at, along = drawn(0), drawn(1)
    jvp(lambda *x: blockwise_attention(*x, is_causal=True), at, along)
    assert sum(seen) <= ROWS * HEADS * T * T
    assert max(seen) <= max(attention.SCORES_PER_BLOCK, ROWS * HEADS * T)


def test_dropout_is_torchs_own() -> None:
    q, k, v = drawn(0)
    torch.manual_seed(3)
    found = blockwise_attention(q, k, v, dropout_p=0.5)
    assert not torch.allclose(found, F.scaled_dot_product_attention(q, k, v))
