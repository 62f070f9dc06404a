"""Causal attention over one row of tokens that several sequences share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fx_influence.batching.packed_layout import PackedLayout
from fx_influence.policy.attention import repeat_heads


class PackedAttention(TorchFunctionMode):
    """While active, causal attention over the one row of a layout is that of its sequences, each for itself.

    Everything else in a model that takes a token at a time needs no change, and costs N tokens. Raises
    ``NotImplementedError`` at attention that is not plainly causal, of which a layout says nothing.
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
        # A single query sees all there is, causal or not, and is not called causal by models of transformers.
        if attn_mask is not None or dropout_p != 0 or not (is_causal or query.shape[-2] == 1):
            raise NotImplementedError(
                "the model's attention is not plainly causal over a row of tokens; load it with "
                "attn_implementation='eager', and every row goes through it whole"
            )
        if self._biases is None:
            # A mask of bools would be made one of numbers in every layer.
            none = torch.zeros((), dtype=query.dtype, device=query.device)
            self._biases = [none.masked_fill(~block.mask, -torch.inf) for block in self.layout.buckets]
        if query.device.type != "cpu" and options.pop("enable_gqa", False):
            # With a mask besides, no fused attention of CUDA takes it.
            key, value = (repeat_heads(x, query) for x in (key, value))
        found = []
        for (queries, keys, _), bias in zip(self.layout.buckets, self._biases, strict=True):
            q, k, v = _gather_tokens(query, queries), _gather_tokens(key, keys), _gather_tokens(value, keys)
            out = F.scaled_dot_product_attention(q, k, v, bias, **options)
            found.append(out.transpose(1, 2).flatten(0, 1))
        return _gather_tokens(torch.cat(found).transpose(0, 1).unsqueeze(0), self.layout.inverse_index.unsqueeze(0))


def _gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """(S, H, L, d) of the tokens of (1, H, N, d) that ``index`` (S, L) names."""
    rows = x.squeeze(0).transpose(0, 1)
    # Which has the one backward on the CPU that adds up rows without a call for each.
    return F.embedding(index, rows.flatten(1)).unflatten(-1, rows.shape[1:]).transpose(1, 2)
