"""Log-probabilities, entropies and moments of completion tokens, and the surrogate loss on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from fx_influence.batching.microbatch import MicroBatch
from fx_influence.core.batch_checks import check_fields
from fx_influence.core.checks import check_options
from fx_influence.core.parameter_checks import check_apply, check_params
from fx_influence.core.tree import promote
from fx_influence.policy.lm_head import TokenWeights, head_token_moments, head_token_values
from fx_influence.policy.precision import in_float32
from fx_influence.policy.split import SplitPolicy, split_policy
from fx_influence.types import Apply, Batch, Params, TokenMoments, TokenStatistics, TokenValues


def token_values(params: Params, batch: Batch, apply: Apply, temperature: float = 1.0) -> TokenValues:
    """Return log-probability and entropy of every completion token under softmax(logits / temperature).

    One forward; all logits exist at once. The function may be called inside any transformation of ``torch.func``.

    Args:
        params: trainable parameters by name. Weights in half precision are raised to float32 first.
        batch: rollouts (B, T); only completion tokens are scored.
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.

    Returns:
        ``TokenValues``, (B, T) each, in nats, aligned with ``input_ids`` (the token at t is scored by the logits at
        t-1) and 0 outside completions; float64 for float64 logits, else float32. Logits of -inf count as probability
        0 and give no NaN.

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
    # Logits at padding may be anything: replaced before the softmax, they cannot turn a derivative into NaN.
    log_pi = torch.where(mask.unsqueeze(-1), logits, torch.zeros_like(logits)).log_softmax(-1)
    pi = log_pi.exp()
    entropies = -(pi * torch.where(pi > 0, log_pi, torch.zeros_like(log_pi))).sum(-1)
    logprobs = log_pi.gather(-1, batch.input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return TokenValues(_align_with_tokens(logprobs, mask), _align_with_tokens(entropies, mask))


def _align_with_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Move values (B, T-1) from the positions that score to the tokens scored, (B, T), 0 outside ``mask``."""
    return torch.nn.functional.pad(torch.where(mask, values, torch.zeros_like(values)), (1, 0))


def all_token_values(
    params: Params, batch: Batch, apply: Apply, temperature: float = 1.0, chunk_size: int | None = None
) -> TokenValues:
    """Return ``token_values`` of a batch of any size, by micro-batches and without an autograd graph.

    Args:
        params: trainable parameters by name.
        batch: rollouts (B, T).
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
        chunk_size: rows per forward; None chooses by tokens.

    Returns:
        ``TokenValues``, (B, T) each.
    """
    return _by_micro_batches(head_token_values, params, batch, apply, temperature, chunk_size)


def all_token_moments(
    params: Params, batch: Batch, apply: Apply, temperature: float = 1.0, chunk_size: int | None = None
) -> TokenMoments:
    """Return ``all_token_values`` with sum pi^2 and sum pi^2 log pi of every completion token.

    Args:
        params: trainable parameters by name.
        batch: rollouts (B, T).
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
        chunk_size: rows per forward; None chooses by tokens.

    Returns:
        ``TokenMoments``, (B, T) each.
    """
    return _by_micro_batches(head_token_moments, params, batch, apply, temperature, chunk_size)


def _by_micro_batches(
    head_fn: Callable[[SplitPolicy, Params, Tensor, Tensor, float], TokenStatistics],
    params: Params,
    batch: Batch,
    apply: Apply,
    temperature: float,
    chunk_size: int | None,
) -> TokenStatistics:
    """Return what ``head_fn(policy, params, hidden, targets, temperature)`` gives for every completion token."""
    policy = split_policy(apply)
    values = []
    with torch.no_grad():
        for micro_batch in policy.micro_batches(batch, chunk_size):
            hidden = scored_hidden_states(policy.backbone(params, micro_batch), micro_batch)
            values.append((micro_batch, head_fn(policy, params, hidden, micro_batch.targets, temperature)))
        return scatter_to_batch(values, batch)


def scored_hidden_states(hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Return the hidden states that score a completion token each, (n, d), of all hidden states (b, L, d)."""
    return hidden[micro_batch.row, micro_batch.position]


def scatter_to_batch(values: Sequence[tuple[MicroBatch, TokenStatistics]], batch: Batch) -> TokenStatistics:
    """Return the values (..., n) of the tokens of all micro-batches at their positions in the batch, (..., B, T)."""
    flat_index = torch.cat([micro_batch.flat_index for micro_batch, _ in values])
    fields = []
    for by_micro_batch in zip(*(field for _, field in values), strict=True):
        scored = torch.cat(by_micro_batch, -1)
        flat = scored.new_zeros(*scored.shape[:-1], batch.input_ids.numel()).index_copy(-1, flat_index, scored)
        fields.append(rearrange(flat, "... (row pos) -> ... row pos", row=len(batch.input_ids)))
    return type(values[0][1])(*fields)


def loss_weights(batch: Batch, micro_batch: MicroBatch) -> TokenWeights:
    """Return c and b of the tokens that a micro-batch scores, (n,) each or None."""
    c, b = (
        None if w is None else w.flatten()[micro_batch.flat_index]
        for w in (batch.coefficients, batch.entropy_coefficients)
    )
    return c, b


def scaled_loss_weights(batch: Batch, micro_batch: MicroBatch, policy: SplitPolicy) -> TokenWeights:
    """Return ``loss_weights`` times the policy's loss scale; their gradients must be divided by it.

    Args:
        batch: rollouts with coefficients, (B, T).
        micro_batch: some of its rows.
        policy: the split policy, whose ``loss_scale`` is used.
    """
    scale = policy.loss_scale
    c, b = (w if w is None or scale == 1 else w * scale for w in loss_weights(batch, micro_batch))
    return c, b


def surrogate(values: TokenValues, batch: Batch) -> Tensor:
    """Return l = -sum_t (c_t log pi(y_t) + b_t h_t), whose gradient is the loss's; absent coefficients count as 0."""
    loss = values.logprobs.new_zeros(())
    for value, weight in zip(values, (batch.coefficients, batch.entropy_coefficients), strict=True):
        if weight is not None:
            # Coefficients outside completions are never read, because a trainer may leave anything in them.
            loss = loss - torch.where(batch.completion_mask, weight.to(value.dtype) * value, 0.0).sum()
    return loss
