"""Log-probabilities and entropies of completion tokens, and the loss that they make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fx_influence.head import Weights, scores
from fx_influence.parts import Part, parts
from fx_influence.policy import halves
from fx_influence.tree import promote
from fx_influence.types import Apply, Batch, Params, TokenValues


def token_values(params: Params, batch: Batch, apply: Apply, temperature: float = 1.0) -> TokenValues:
    """Log-probability and entropy of every completion token, log softmax(logits / temperature), in one forward.

    ``batch``: (B, T). Both results are (B, T), aligned with ``input_ids`` (the token at t is scored by the logits at
    t-1), float64 for float64 logits, else float32. Logits of -inf count as probability 0 and give no NaN. It may stand
    inside any transformation of ``torch.func``; all logits exist at once.

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


def all_token_values(
    params: Params, batch: Batch, apply: Apply, temperature: float = 1.0, chunk_size: int | None = None
) -> TokenValues:
    """``token_values`` of a batch of any size, part by part, without a graph."""
    policy = halves(apply)
    with torch.no_grad():
        found = []
        for part in parts(batch, chunk_size, policy.aligned):
            features = scored_features(policy.features(params, part.input_ids, part.attention_mask), part)
            found.append((part, scores(policy, params, features, part.targets, temperature)))
        return in_place(found, batch)


def scored_features(features: Tensor, part: Part) -> Tensor:
    """(n, d): the features that score a completion token each, of those at all places (b, L, d)."""
    return features[part.row, part.column]


def in_place(found: Sequence[tuple[Part, TokenValues]], batch: Batch) -> TokenValues:
    """The values (..., n) of every part's tokens where they stand in the batch, (..., B, T)."""
    place = torch.cat([part.place for part, _ in found])
    out = []
    for field in zip(*(values for _, values in found), strict=True):
        value = torch.cat(field, -1)
        whole = value.new_zeros(*value.shape[:-1], batch.input_ids.numel())
        out.append(whole.index_copy(-1, place, value).unflatten(-1, batch.input_ids.shape))
    return TokenValues(*out)


def weights_of(batch: Batch, part: Part) -> Weights:
    """c and b of the tokens that a part scores."""
    c, b = (None if w is None else w.flatten()[part.place] for w in batch[3:5])
    return c, b


def surrogate(values: TokenValues, batch: Batch) -> Tensor:
    """l = -sum_t (c_t log pi(y_t) + b_t h_t), whose gradient is the loss's; terms without coefficients are left out."""
    loss = values.logprobs.new_zeros(())
    for value, weight in zip(values, (batch.coefficients, batch.entropy_coefficients), strict=True):
        if weight is not None:
            loss = loss - (weight.to(value.dtype) * value).sum()
    return loss
