"""Attention in blocks against torch's own, value and derivatives, and the blocks' size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cases import assert_close
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

from fx_influence.policy.attention import blockwise_attention

ROWS, HEADS, T, D = 2, 4, 9, 3
Triple = tuple[Tensor, Tensor, Tensor]


def random_qkv(seed: int, heads: int = HEADS) -> Triple:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((ROWS, HEADS, T, D), (ROWS, heads, T, D), (ROWS, heads, T, D))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def literal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Return attention, computed one query at a time; ``mask``: True where a query may attend."""
    k, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
    out = []
    for t in range(q.shape[2]):
        scores = (q[:, :, t : t + 1] * k).sum(-1) * (D**-0.5 if scale is None else scale)
        weight = scores if mask is None else scores.masked_fill(~mask[..., t, :], -1e9)
        out.append((weight.softmax(-1).unsqueeze(-1) * v).sum(2))
    return torch.stack(out, 2)


CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
PADDED = CAUSAL & (torch.arange(T) > 0)[None, None, None, :] | torch.eye(T, dtype=torch.bool)
CASES: dict[str, tuple[dict[str, Any], Tensor | None, int]] = {
    "all": ({}, None, HEADS),
    "causal": ({"is_causal": True}, CAUSAL, HEADS),
    "causal, fewer keys than queries": ({"is_causal": True, "enable_gqa": True}, CAUSAL, 2),
    "masked": ({"attn_mask": PADDED}, PADDED, HEADS),
    "added": ({"attn_mask": torch.where(PADDED, 0.0, -1e9).double()}, PADDED, HEADS),
    "scaled": ({"attn_mask": CAUSAL, "scale": 0.3}, CAUSAL, HEADS),
}


@pytest.fixture(params=[1, 2 * ROWS * HEADS * T, 2**24], ids=["1 query", "2 queries", "all queries"])
def max_scores(request: pytest.FixtureRequest) -> int:
    """Return the number of scores that exist at once: those of one query, of two, or of all."""
    return int(request.param)


def pair(case: str, max_scores: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Triple, Triple]:
    options, mask, heads = CASES[case]
    ours = lambda q, k, v: blockwise_attention(q, k, v, **options, max_scores=max_scores)  # noqa: E731
    return (
        ours,
        lambda q, k, v: literal(q, k, v, mask, options.get("scale")),
        random_qkv(0, heads),
        random_qkv(1, heads),
    )


@pytest.mark.parametrize("case", CASES)
def test_blockwise_attention_matches_literal_definition(case: str, max_scores: int) -> None:
    ours, slow, point, tangents = pair(case, max_scores)
    assert_close(ours(*point), slow(*point))
    assert_close(jvp(ours, point, tangents)[1], jvp(slow, point, tangents)[1])
    for which in range(3):
        one = [x if k == which else torch.zeros_like(x) for k, x in enumerate(tangents)]
        assert_close(jvp(ours, point, tuple(one))[1], jvp(slow, point, tuple(one))[1])
        g, expected = (grad(lambda *x, f=f: f(*x).sin().sum(), which)(*point) for f in (ours, slow))
        assert_close(g, expected)
    assert_close(vmap(ours)(*(torch.stack([x, 2 * x]) for x in point))[1], slow(*(2 * x for x in point)))


def test_blockwise_attention_has_jvp_of_queries_alone(max_scores: int) -> None:
    ours, slow, (q, k, v), (dq, _, _) = pair("causal", max_scores)
    assert_close(jvp(lambda q: ours(q, k, v), (q,), (dq,))[1], jvp(lambda q: slow(q, k, v), (q,), (dq,))[1])


def test_blockwise_attention_is_0_where_no_key_is_visible(max_scores: int) -> None:
    mask = CAUSAL & (torch.arange(T) > 1)
    point, tangents = random_qkv(0), random_qkv(1)
    attend = lambda q, k, v: blockwise_attention(q, k, v, attn_mask=mask, max_scores=max_scores)  # noqa: E731
    both: tuple[Tensor, ...] = jvp(attend, point, tangents)
    value, derivative = both
    assert torch.isfinite(value).all()
    assert torch.isfinite(derivative).all()
    assert not value[:, :, :2].any()
    assert value[:, :, 2:].all()


def test_blockwise_attention_forms_at_most_max_scores(max_scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    softmax = torch.Tensor.softmax

    def watched(x: Tensor, dim: int) -> Tensor:
        sizes.append(x.numel())
        return softmax(x, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", watched)
    attend = lambda q, k, v: blockwise_attention(q, k, v, is_causal=True, max_scores=max_scores)  # noqa: E731
    jvp(attend, random_qkv(0), random_qkv(1))
    assert sum(sizes) <= ROWS * HEADS * T * T
    assert max(sizes) <= max(max_scores, ROWS * HEADS * T)


def test_blockwise_attention_passes_dropout_to_torch() -> None:
    q, k, v = random_qkv(0)
    torch.manual_seed(3)
    out = blockwise_attention(q, k, v, dropout_p=0.5)
    assert not torch.allclose(out, F.scaled_dot_product_attention(q, k, v))
