"""Log-probabilities and entropies of completion tokens, and their derivatives, in chunks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from fx_influence.tree import largest_entry, promote
from fx_influence.types import Apply, Batch, Gradients, Params

TOKENS_PER_CHUNK = 2048
"""Rows are taken together up to this many tokens where the caller names no ``chunk_size``."""


class TokenValues(NamedTuple):
    """What a policy says of each completion token, (..., B, T), 0 outside the completion mask.

    ``logprobs``: log pi(y_t | y_<t). ``entropies``: h_t = -sum_y pi log pi over the full vocabulary. In nats.
    """

    logprobs: Tensor
    entropies: Tensor


def token_values(params: Params, batch: Batch, apply: Apply, temperature: float = 1.0) -> TokenValues:
    """Log-probability and entropy of every completion token, log softmax(logits / temperature), in one forward.

    ``batch``: (B, T). Both results are (B, T), aligned with ``input_ids`` (the token at t is scored by the logits at
    t-1), float64 for float64 logits, else float32. Logits of -inf count as probability 0 and give no NaN.

    Example:
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True, True]]))
        >>> values = token_values({"b": torch.zeros(4)}, batch, lambda p, i, m: p["b"].expand(*i.shape, 4))
        >>> round(values.entropies[0, 1].item(), 4), round(values.logprobs[0, 2].item(), 4)
        (1.3863, -1.3863)
    """
    logits = apply(params, batch.input_ids, batch.attention_mask)[:, :-1]
    mask = batch.completion_mask[:, 1:]
    logits = logits.to(promote(logits.dtype)) / temperature
    # Rows of padding may carry anything: replaced before the softmax, they cannot turn a derivative into NaN.
    log_pi = torch.where(mask.unsqueeze(-1), logits, torch.zeros_like(logits)).log_softmax(-1)
    pi = log_pi.exp()
    entropies = -(pi * torch.where(pi > 0, log_pi, torch.zeros_like(log_pi))).sum(-1)
    logprobs = log_pi.gather(-1, batch.input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return TokenValues(_scatter(logprobs, mask), _scatter(entropies, mask))


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    return torch.nn.functional.pad(torch.where(mask, values, torch.zeros_like(values)), (1, 0))


def rows(batch: Batch, index: slice | Tensor) -> Batch:
    """The rows of a batch that ``index`` picks, in its order."""
    return Batch._make(None if field is None else field[index] for field in batch)


def distinct_rows(batch: Batch) -> tuple[Batch, Tensor]:
    """The rows that differ in some field, each once, and for every row of ``batch`` the index of its equal, (B,).

    A policy of low entropy samples the same completion again and again; what depends on a row alone is then computed
    once. ``group`` is not compared.

    Example:
        >>> ids = torch.tensor([[1, 2], [1, 3], [1, 2]])
        >>> once, index = distinct_rows(Batch(ids, ids > 0, ids > 1))
        >>> once.input_ids.tolist(), index.tolist()
        ([[1, 2], [1, 3]], [0, 1, 0])
    """
    fields = [field.double() for field in batch._replace(group=None) if field is not None]
    unique, index = torch.unique(torch.cat(fields, dim=1), dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(index), dtype=torch.int64, device=index.device)
    first.scatter_reduce_(0, index, torch.arange(len(index), device=index.device), "amin")
    return rows(batch, first), index


def row_chunks(batch: Batch, chunk_size: int | None) -> Iterator[Batch]:
    """Consecutive rows, ``chunk_size`` at a time, or as many as fit ``TOKENS_PER_CHUNK``."""
    n, t = batch.input_ids.shape
    size = max(1, TOKENS_PER_CHUNK // max(t, 1)) if chunk_size is None else chunk_size
    for start in range(0, n, size):
        yield rows(batch, slice(start, start + size))


def all_token_values(
    params: Params, batch: Batch, apply: Apply, temperature: float = 1.0, chunk_size: int | None = None
) -> TokenValues:
    """``token_values`` of a batch of any size, chunk by chunk, without a graph."""
    with torch.no_grad():
        return concatenate([token_values(params, part, apply, temperature) for part in row_chunks(batch, chunk_size)])


def concatenate(parts: list[TokenValues], dim: int = 0) -> TokenValues:
    """Chunks of rows put back together; ``dim`` is the axis of rows."""
    return TokenValues(*(torch.cat(field, dim) for field in zip(*parts, strict=True)))


def batch_gradient(
    params: Params, batch: Batch, apply: Apply, temperature: float = 1.0, chunk_size: int | None = None
) -> Gradients:
    """g = grad of -sum_it (c_it log pi(y_it) + b_it h_it) by reverse mode, accumulated over chunks of rows.

    ``batch.coefficients`` is c and ``batch.entropy_coefficients`` b, (B, T). Returns one tensor per parameter, at
    least float32, and None where backward never reaches the parameter, as ``p.grad`` would be.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    total: Gradients = dict.fromkeys(params)
    for part in row_chunks(batch, chunk_size):
        with torch.enable_grad():
            loss = surrogate(token_values(leaves, part, apply, temperature), part)
        for name, g in _reverse(loss, leaves).items():
            old = total[name]
            total[name] = g if old is None else old.add_(g)
    return total


def weighted_gradient(
    params: Params,
    batch: Batch,
    apply: Apply,
    weigh: Callable[[TokenValues], Batch],
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Batch, Gradients]:
    """``weigh(values)``, the batch with coefficients that depend on all its token values, and its ``batch_gradient``.

    A batch of one chunk goes forward once for both; a larger one twice, so that the graph of one chunk is held at most.
    """
    if len(list(row_chunks(batch, chunk_size))) > 1:
        weighted = weigh(all_token_values(params, batch, apply, temperature, chunk_size))
        return weighted, batch_gradient(params, weighted, apply, temperature, chunk_size)
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    with torch.enable_grad():
        values = token_values(leaves, batch, apply, temperature)
    weighted = weigh(TokenValues(*(value.detach() for value in values)))
    with torch.enable_grad():
        loss = surrogate(values, weighted)
    return weighted, {**dict.fromkeys(params), **_reverse(loss, leaves)}


def _reverse(loss: Tensor, leaves: Params) -> Params:
    """The gradient of the leaves that ``loss`` reaches, at least float32."""
    if not loss.requires_grad:
        return {}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: g.to(promote(g.dtype)) for name, g in zip(leaves, grads, strict=True) if g is not None}


def surrogate(values: TokenValues, batch: Batch) -> Tensor:
    """l = -sum_t (c_t log pi(y_t) + b_t h_t), whose gradient is the loss's; terms without coefficients are left out."""
    loss = values.logprobs.new_zeros(())
    for value, weight in zip(values, (batch.coefficients, batch.entropy_coefficients), strict=True):
        if weight is not None:
            loss = loss - (weight.to(value.dtype) * value).sum()
    return loss


def token_jvp(
    params: Params,
    direction: Params,
    batch: Batch,
    apply: Apply,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> TokenValues:
    """Directional derivatives <d log pi(y_it)/dtheta, v> and <dh_it/dtheta, v> of every token, by forward mode.

    ``direction``: v, by name, any float dtype; names absent count as 0. Returns (B, T) each, float64 for float64
    parameters, else float32. v is scaled to unit maximum before it is cast to the parameters' dtype and the result
    scaled back, so that a huge or tiny v neither overflows nor vanishes.
    """
    scale = largest_entry(direction)
    tangent = {
        name: (direction[name] / scale).to(p.dtype) if name in direction else torch.zeros_like(p)
        for name, p in params.items()
    }
    parts = []
    with torch.no_grad():
        for part in row_chunks(batch, chunk_size):
            d = jvp(_values_of(part, apply, temperature), (params,), (tangent,))[1]
            parts.append(TokenValues(d.logprobs * scale, d.entropies * scale))
    return concatenate(parts)


def _values_of(batch: Batch, apply: Apply, temperature: float) -> Callable[[Params], TokenValues]:
    return lambda params: token_values(params, batch, apply, temperature)
