"""Attention in blocks of queries, which supports every transformation of torch.func."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from fx_influence.core.tree import promote
from fx_influence.policy.autocast import active_autocast_dtype

MAX_SCORES = 2**24
"""Attention scores that exist at once: 64 MiB of float32, and a few times that with their tangents."""


def blockwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    max_scores: int = MAX_SCORES,
) -> Tensor:
    """Return softmax(scale query key^T + mask) value, (..., T, d), computed for a block of queries at a time.

    The arguments are those of ``torch.nn.functional.scaled_dot_product_attention``, of which this is the plain form: it
    has all derivatives, forward mode included, and a rule under vmap. Under ``is_causal`` a block does not see the keys
    after it. A query that sees no key gives 0.

    Args:
        query: (..., T, d).
        key: (..., S, d).
        value: (..., S, d).
        attn_mask: bool, True where a query may attend, or a number to add to each score; broadcast to (..., T, S).
        dropout_p: probability of dropping a weight.
        is_causal: whether query t sees keys 0 to t alone; then ``attn_mask`` is not read.
        scale: factor on the scores, None for d ** -0.5.
        enable_gqa: whether several heads of queries share keys and values.
        max_scores: about how many scores exist at once, so that memory grows with T and not with T^2.

    Source:
        Rabe & Staats 2021, arXiv 2112.05682 (its blocks of queries alone).

    Example:
        >>> q = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 1, 4, 3)
        >>> plain = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        >>> bool(torch.allclose(blockwise_attention(q, q, q, is_causal=True), plain))
        True
    """
    if (dtype := active_autocast_dtype(query.device.type)) is not None:
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if enable_gqa:
        key, value = (repeat_heads(x, query) for x in (key, value))
    queries, keys = query.shape[-2], key.shape[-2]
    size = max(1, max_scores // max(1, query.shape[:-2].numel() * keys))
    outputs = []
    for start in range(0, queries, size):
        end = min(start + size, queries)
        visible = min(end, keys) if is_causal else keys
        mask = attn_mask
        if is_causal:
            mask = torch.ones(end - start, visible, dtype=torch.bool, device=query.device).tril(start)
        elif mask is not None and mask.shape[-2] != 1:
            mask = mask[..., start:end, :]
        block = query[..., start:end, :], key[..., :visible, :], value[..., :visible, :]
        if dropout_p == 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in block):
            outputs.append(_attention_jvp(*block, mask, scale))
        else:
            with math_attention():
                outputs.append(F.scaled_dot_product_attention(*block, mask, dropout_p, scale=scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2)


def repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    """Return keys or values (..., H', S, d) repeated for each of the H heads of queries (..., H, T, d)."""
    groups = query.shape[-3] // x.shape[-3]
    return x if groups == 1 else x.repeat_interleave(groups, -3)


def math_attention() -> AbstractContextManager[None]:
    """Return a context in which ``scaled_dot_product_attention`` takes its plain form.

    The fused kernels have no forward-mode derivative and no vmap rule (torch 2.14).
    """
    if hasattr(torch.nn, "attention"):
        return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    # torch before 2.3
    return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_math=True, enable_mem_efficient=False)


def _attention_jvp(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Return attention with its tangent, fused to traverse the scores half as often as the single operations do."""
    shape = *query.shape[:-2], query.shape[-2], key.shape[-2]
    bias = torch.zeros((), dtype=promote(query.dtype), device=query.device)
    if mask is not None:
        bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.to(bias.dtype)
    bias = bias.expand(shape).reshape(-1, *shape[-2:])
    flat = (x.expand(*query.shape[:-2], *x.shape[-2:]).flatten(0, -3) for x in (query, key, value))
    # The fused kernels, too, compute in float32 where inputs are in half precision.
    dtype = promote(value.dtype)
    (q, dq), (k, dk), (v, dv) = ((x.to(dtype) for x in _unpack_dual(y)) for y in flat)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        # Where a query sees no key its softmax is 0 / 0.
        p = (q @ k.mT).mul_(factor).add_(bias).softmax(-1).nan_to_num_(0.0)
        ds = (dq @ k.mT).baddbmm_(q, dk.mT, beta=factor, alpha=factor).mul_(p)
        dp = ds.addcmul_(p, ds.sum(-1, keepdim=True), value=-1)
        both = p @ v, (dp @ v).baddbmm_(p, dv)
    out = forward_ad.make_dual(*(x.to(value.dtype) for x in both))
    return out.unflatten(0, query.shape[:-2])


def _unpack_dual(x: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = forward_ad.unpack_dual(x)
    return primal, torch.zeros_like(primal) if tangent is None else tangent
