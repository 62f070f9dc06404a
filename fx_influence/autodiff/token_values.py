"""Log-probabilities and entropies of completion tokens, and the loss that they make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fx_influence.batching.microbatch import MicroBatch
from fx_influence.core.batch_checks import check_fields
from fx_influence.core.checks import check_options
from fx_influence.core.parameter_checks import check_apply, check_params
from fx_influence.core.tree import promote
from fx_influence.policy.lm_head import TokenWeights, head_token_values
from fx_influence.policy.precision import in_float32
from fx_influence.policy.split import SplitPolicy, split_policy
from fx_influence.types import Apply, Batch, Params, TokenValues


def token_values(params: Params, batch: Batch, apply: Apply, temperature: float = 1.0) -> TokenValues:
    """Log-probability and entropy of every completion token, log softmax(logits / temperature), in one forward.

    ``batch``: (B, T). Both results are (B, T), aligned with ``input_ids`` (the token at t is scored by the logits at
    t-1), float64 for float64 logits, else float32. Weights in half precision are raised to float32 first. Logits of
    -inf count as probability 0 and give no NaN. It may stand inside any transformation of ``torch.func``; all logits
    exist at once.

    Example:
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True, True]]))
        >>> values = token_values({"b": torch.zeros(4)}, batch, lambda p, i, m: p["b"].expand(*i.shape, 4))
        >>> round(values.entropies[0, 1].item(), 4), round(values.logprobs[0, 2].item(), 4)
        (1.3863, -1.3863)
    """
    check_apply(apply)
    check_params(params)
    check_options(temperature, None)
    check_fields("batch", batch)
    params, apply = in_float32(params, apply, batch)
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
    policy = split_policy(apply)
    with torch.no_grad():
        found = []
        for part in policy.micro_batches(batch, chunk_size):
            features = scored_features(policy.backbone(params, part), part)
            found.append((part, head_token_values(policy, params, features, part.targets, temperature)))
        return scatter_to_batch(found, batch)


def scored_features(features: Tensor, part: MicroBatch) -> Tensor:
    """(n, d): the features that score a completion token each, of those at all places (b, L, d)."""
    return features[part.row, part.position]


def scatter_to_batch(found: Sequence[tuple[MicroBatch, TokenValues]], batch: Batch) -> TokenValues:
    """The values (..., n) of every part's tokens where they stand in the batch, (..., B, T)."""
    place = torch.cat([part.flat_index for part, _ in found])
    out = []
    for field in zip(*(values for _, values in found), strict=True):
        value = torch.cat(field, -1)
        whole = value.new_zeros(*value.shape[:-1], batch.input_ids.numel())
        out.append(whole.index_copy(-1, place, value).unflatten(-1, batch.input_ids.shape))
    return TokenValues(*out)


def loss_weights(batch: Batch, part: MicroBatch) -> TokenWeights:
    """c and b of the tokens that a part scores."""
    c, b = (None if w is None else w.flatten()[part.flat_index] for w in batch[3:5])
    return c, b


def scaled_loss_weights(batch: Batch, part: MicroBatch, policy: SplitPolicy) -> TokenWeights:
    """``loss_weights`` times the policy's loss scale, by which gradients made with them are to be divided."""
    c, b = (w if w is None or policy.loss_scale == 1 else w * policy.loss_scale for w in loss_weights(batch, part))
    return c, b


def surrogate(values: TokenValues, batch: Batch) -> Tensor:
    """l = -sum_t (c_t log pi(y_t) + b_t h_t), whose gradient is the loss's; terms without coefficients are left out."""
    loss = values.logprobs.new_zeros(())
    for value, weight in zip(values, (batch.coefficients, batch.entropy_coefficients), strict=True):
        if weight is not None:
            # What stands outside of completions is never read.
            loss = loss - torch.where(batch.completion_mask, weight.to(value.dtype) * value, 0.0).sum()
    return loss
