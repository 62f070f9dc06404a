"""Causal attention over one row of tokens into which several sequences are packed."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fx_influence.batching.packed_layout import PackedLayout
from fx_influence.policy.attention import repeat_heads


class PackedAttention(TorchFunctionMode):
    """While active, causal attention over the row of a layout is attention within each of its sequences.

    Everything else in a model that takes one token at a time needs no change, and costs N tokens. Attention that is not
    plainly causal raises ``NotImplementedError``, because a layout says nothing of it.

    Args:
        layout: the sequences in the row.
    """

    def __init__(self, layout: PackedLayout) -> None:
        super().__init__()
        self.layout = layout
        self.calls = 0
        self._biases: list[Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        # A single query sees every key, causal or not, and Hugging Face models do not call it causal.
        if attn_mask is not None or dropout_p != 0 or not (is_causal or query.shape[-2] == 1):
            raise NotImplementedError(
                "the model's attention is not plainly causal over a row of tokens; expected no mask and no "
                "dropout. Load it with attn_implementation='eager', and every row goes through it unpacked"
            )
        if self._biases is None:
            # A mask of bools would be turned into one of numbers in every layer.
            zero = torch.zeros((), dtype=query.dtype, device=query.device)
            self._biases = [zero.masked_fill(~bucket.mask, -torch.inf) for bucket in self.layout.buckets]
        if query.device.type != "cpu" and options.pop("enable_gqa", False):
            # No fused attention of CUDA takes grouped heads together with a mask.
            key, value = (repeat_heads(x, query) for x in (key, value))
        outputs = []
        for (queries, keys, _), bias in zip(self.layout.buckets, self._biases, strict=True):
            q, k, v = _gather_tokens(query, queries), _gather_tokens(key, keys), _gather_tokens(value, keys)
            out = F.scaled_dot_product_attention(q, k, v, bias, **options)
            outputs.append(rearrange(out, "seq head pos dim -> (seq pos) head dim"))
        packed = rearrange(torch.cat(outputs), "token head dim -> 1 head token dim")
        return _gather_tokens(packed, self.layout.inverse_index.unsqueeze(0))


def _gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Return (S, H, L, d), the tokens of ``x`` (1, H, N, d) at ``index`` (S, L)."""
    tokens = rearrange(x, "1 head token dim -> token (head dim)")
    # F.embedding is the one gather whose backward on the CPU accumulates rows in a single kernel.
    return rearrange(F.embedding(index, tokens), "seq pos (head dim) -> seq head pos dim", head=x.shape[1])
