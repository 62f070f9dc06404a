"""Small cases for tests: a float64 causal transformer, a dyadic table policy, random batches, AdamW states.

Nothing here imports the library beyond ``types``, so the reference can be tested with no other module of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from fx_influence.types import AdamWHyper, AdamWState, Apply, Batch, Params
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding

Padding = Literal["right", "left"]


class Block(nn.Module):
    """Pre-norm attention and MLP, with biases everywhere."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Return (B, T, D); ``visible``: bool (B, T, T), query by key."""
        qkv = self.qkv(self.norm_attention(x))
        q, k, v = rearrange(qkv, "row pos (three head dim) -> three row head pos dim", three=3, head=self.heads)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        # With a finite floor a query without keys attends evenly instead of to NaN; other queries are unaffected.
        scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
        attended = rearrange(scores.softmax(-1) @ v, "row head pos dim -> row pos (head dim)")
        x = x + self.dropout(self.out(attended))
        mlp: Tensor = self.dropout(self.down(nn.functional.gelu(self.up(self.norm_mlp(x)))))
        return x + mlp


class TinyPolicy(nn.Module):
    """A causal transformer with learned absolute positions, in float64 and with no weight at its default value.

    ``tied``: the head's weight is the token embedding (one tensor under two names). ``idle``: one more parameter, which
    forward never uses. ``dropout``: acts in training mode only. ``seed`` alone determines every weight.
    """

    def __init__(
        self,
        vocab: int = 7,
        dim: int = 8,
        layers: int = 1,
        heads: int = 2,
        max_len: int = 16,
        tied: bool = False,
        *,
        idle: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab, dim)
        self.position = nn.Embedding(max_len, dim)
        self.blocks = nn.ModuleList([Block(dim, heads, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab)
        if tied:
            self.head.weight = self.token.weight
        if idle:
            self.idle = nn.Parameter(torch.ones(3))
        self.double()
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            spread = 0.7 if p.ndim == 2 else 0.3
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.data.copy_(centre + spread * noise)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V); without ``position_ids`` positions are 0..T-1, whatever the padding."""
        length = input_ids.shape[-1]
        order = torch.arange(length, device=input_ids.device)
        position_ids = order.expand_as(input_ids) if position_ids is None else position_ids
        visible = (order[:, None] >= order[None, :])[None] & attention_mask.bool()[:, None, :]
        x = self.token(input_ids) + self.position(position_ids)
        for block in self.blocks:
            x = block(x, visible)
        logits: Tensor = self.head(self.norm(x))
        return logits


class TablePolicy(nn.Module):
    """A policy whose next-token logits are a table's row for (position, current token)."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.clone())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Return logits (B, T, V)."""
        return self.table[position_ids.clamp(max=len(self.table) - 1), input_ids]


def dyadic_policy(generator: torch.Generator, vocab: int = 3, units: Sequence[int] = (4, 8, 4, 4)) -> TablePolicy:
    """Return a TablePolicy whose probabilities at position p are positive multiples of 1/units[p] (vocab <= units[p]).

    Completions that start after position p then have probabilities in multiples of 1/(units[p] units[p+1] ...), and so
    a finite batch can be the policy's distribution: see ``enumeration.replicate``. The last units repeat.
    """
    table = torch.ones(len(units), vocab, vocab, dtype=torch.float64)
    for position, unit in enumerate(units):
        for _ in range(unit - vocab):
            chosen = torch.randint(vocab, (vocab,), generator=generator)
            table[position, torch.arange(vocab), chosen] += 1
    return TablePolicy((table / table.sum(-1, keepdim=True)).log())


def make_apply(model: nn.Module) -> tuple[Apply, Params]:
    """Return (apply, params) of a module: detached clones of its parameters, position ids from the attention mask."""
    params = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def apply(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        logits: Tensor = functional_call(model, params, (input_ids, attention_mask, position_ids))
        return logits

    return apply, params


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    """Draw one integer from low..high, both included."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def _unequal_groups(generator: torch.Generator, n: int, groups: int) -> Tensor:
    """Return (n,) labels 0..groups-1 in random order, each used, with unequal counts if n > groups > 1."""
    while True:
        extra = (groups * torch.rand(n - groups, generator=generator) ** 2).long()
        labels = torch.cat([torch.arange(groups), extra])
        counts = torch.bincount(labels, minlength=groups).tolist()
        if n == groups or groups == 1 or len(set(counts)) > 1:
            return labels[torch.randperm(n, generator=generator)]


def random_batch(
    generator: torch.Generator,
    n: int,
    t: int,
    vocab: int,
    *,
    groups: int | None = None,
    padding: Padding = "right",
    gaps: bool = False,
    coefficients: bool = True,
    entropy_coefficients: bool = False,
    min_len: int = 1,
    max_len: int | None = None,
) -> Batch:
    """Return a valid batch: random ids, also in the padding, prompts of at least one token, varied completions.

    Args:
        generator: source of all draws.
        n: number of rows.
        t: width.
        vocab: number of token ids.
        groups: number of groups, of unequal sizes; None: the batch has no group.
        padding: side of the padding.
        gaps: whether tokens are cut out of the completion mask, never the last of a row.
        coefficients: whether there are coefficients: asymmetric, and 0 outside the completion mask.
        entropy_coefficients: whether there are those of an entropy bonus.
        min_len: completion tokens of row 0, the shortest; 0 allows rows without a completion.
        max_len: completion tokens of row 1, the longest; default t - 1.
    """
    max_len = t - 1 if max_len is None else max_len
    lengths = [_integer(generator, min_len, max_len) for _ in range(n)]
    lengths[: min(n, 2)] = [min_len, max_len][:n]
    column = torch.arange(t)
    attention, completion = torch.zeros(n, t, dtype=torch.bool), torch.zeros(n, t, dtype=torch.bool)
    for i, length in enumerate(lengths):
        used = length + _integer(generator, 1, t - length)
        start = 0 if padding == "right" else t - used
        attention[i] = (column >= start) & (column < start + used)
        completion[i] = (column >= start + used - length) & (column < start + used)
        if gaps and length > 1:
            cut = torch.rand(t, generator=generator) < 0.35
            cut[start + used - length + _integer(generator, 0, length - 2)] = True
            cut[start + used - 1] = False
            completion[i] &= ~cut
    c, b = (0.2 + torch.randn(n, t, generator=generator, dtype=torch.float64) for _ in range(2))
    return Batch(
        input_ids=torch.randint(vocab, (n, t), generator=generator),
        attention_mask=attention,
        completion_mask=completion,
        coefficients=c * completion if coefficients else None,
        entropy_coefficients=0.3 * b * completion if entropy_coefficients else None,
        group=None if groups is None else _unequal_groups(generator, n, groups),
    )


def random_adamw_state(generator: torch.Generator, params: Params, **hyper: Any) -> AdamWState:
    """Return a warm AdamWState of asymmetric random values; parameters alternate between two groups and step counts.

    ``hyper`` overrides, for all parameters: lr_scale, beta1, beta2, eps, weight_decay, amsgrad, maximize, ``step``;
    and ``lr``; and ``absent``, names that the optimizer does not hold.
    """
    lr, step, absent = hyper.pop("lr", 1e-3), hyper.pop("step", None), hyper.pop("absent", ())
    state = AdamWState({}, {}, {}, {}, {}, lr)
    groups = (
        AdamWHyper(**{"beta2": 0.99, "weight_decay": 0.1, **hyper}),
        AdamWHyper(**{"lr_scale": 0.25, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, **hyper}),
    )
    for i, (name, p) in enumerate(params.items()):
        m, s, extra = (torch.randn(p.shape, generator=generator, dtype=p.dtype) for _ in range(3))
        if name in absent:
            continue
        state.exp_avg[name] = 0.3 * m + 0.05
        state.exp_avg_sq[name] = 0.2 * s**2 + 0.01
        state.step[name] = (7, 3)[i % 2] if step is None else step
        state.hyper[name] = groups[i % 2]
        if groups[i % 2].amsgrad:
            state.max_exp_avg_sq[name] = state.exp_avg_sq[name] * (1 + 0.5 * extra.abs())
    return state


def max_error(actual: Any, expected: Any) -> float:
    """Return the largest |actual - expected| over the largest |expected|, of tensors or arrays of one shape."""
    actual, expected = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual - expected).abs().max() / expected.abs().max())


def random_direction(generator: torch.Generator, params: Params, size: float = 0.1) -> Params:
    """Return a direction in parameter space: independent normal entries of standard deviation ``size``."""
    return {name: size * torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in params.items()}


def add_padding(batch: Batch, left: int, right: int) -> Batch:
    """Return the batch with more padding on both sides, filled with ids that a careless mask would read."""

    def pad(field: Tensor, value: float) -> Tensor:
        return nn.functional.pad(field, (left, right), value=value)

    return batch._replace(
        input_ids=pad(batch.input_ids, 3),
        attention_mask=pad(batch.attention_mask, False),
        completion_mask=pad(batch.completion_mask, False),
        coefficients=None if batch.coefficients is None else pad(batch.coefficients, 0.0),
        entropy_coefficients=None if batch.entropy_coefficients is None else pad(batch.entropy_coefficients, 0.0),
        behaviour_logprobs=None if batch.behaviour_logprobs is None else pad(batch.behaviour_logprobs, float("nan")),
    )


def assert_close(
    actual: Tensor, expected: Tensor, scale: Tensor | float | None = None, terms: int = TINY_POLICY
) -> None:
    """Assert equality in float64 up to the rounding of a small policy's passes.

    The magnitude is the largest of ``scale`` (default ``expected``) plus 1, the size of the log-probabilities and
    entropies that are added on the way; see ``tolerances.assert_close_to_rounding``.
    """
    assert actual.dtype == expected.dtype == torch.float64
    size = torch.as_tensor(expected if scale is None else scale).detach().abs()
    scale = 1 + float(size.max() if size.numel() else 0.0)
    assert_close_to_rounding(actual, expected, terms=terms, scale=scale)
