"""Modules of a few parameters for tests of how a model becomes a policy, and batches and states for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fx_influence as fx

VOCAB, WIDTH = 11, 16


class AttentionModel(nn.Module):
    """One layer of causal attention with positions; subclasses override ``transform_stream``."""

    def __init__(self, vocab: int = VOCAB) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, 8), nn.Embedding(WIDTH, 8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, vocab)

    def transform_stream(self, x: Tensor) -> Tensor:
        return x

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        columns = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        x = self.transform_stream(
            self.token(input_ids) + self.position(columns if position_ids is None else position_ids)
        )
        q, k, v = (y.unsqueeze(1) for y in self.qkv(x).chunk(3, -1))
        if attention_mask is None or is_full(attention_mask):
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            visible = columns[:, :, None] >= columns[:, None, :]
            visible = visible & attention_mask.bool()[:, None, :] | torch.eye(columns.shape[1], dtype=torch.bool)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])
        return self.head(torch.tanh(x + attended[:, 0]))


def is_full(mask: Tensor) -> bool:
    """Return whether a mask is known to be True everywhere."""
    try:
        return bool(mask.all())
    except RuntimeError:
        # Under vmap a tensor has no value.
        return False


def is_close(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding of tens of operations, with a margin of ten."""
    bound = 1000 * torch.finfo(expected.dtype).eps
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= bound * expected.abs().max())


def make_float64(kind: type[nn.Module], **options: Any) -> Any:
    """Return a module in float64; two calls give the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return kind(**options).double()


def full_batch(seed: int, rows: int = 6, width: int = 9, vocab: int = VOCAB, prompt: int = 6) -> fx.Batch:
    """Return rows without padding that share one prompt, with coefficients."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (rows, width), generator=generator)
    ids[:, :prompt] = ids[:1, :prompt]
    completion = (torch.arange(width) >= prompt).expand(rows, width)
    weights = torch.randn(rows, width, generator=generator, dtype=torch.float64) * completion
    return fx.Batch(ids, torch.ones_like(completion), completion, coefficients=weights)


def warm_state(model: nn.Module) -> fx.AdamWState:
    """Return AdamW's state after one step on random gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    generator = torch.Generator().manual_seed(7)
    for p in trained:
        p.grad = 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()
    optimizer.zero_grad()
    return fx.adamw_state(optimizer, model)
