"""Log-probabilities and entropies of completion tokens, and the loss that they make."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import vmap

from fx_influence.batching.microbatch import TOKENS_PER_CHUNK, MicroBatch, micro_batches
from fx_influence.batching.rows import select_rows
from fx_influence.core.batch_checks import check_fields
from fx_influence.core.checks import check_options
from fx_influence.core.parameter_checks import check_apply, check_params
from fx_influence.core.tree import promote, shift
from fx_influence.policy.lm_head import MAX_LOGITS, TokenWeights, head_token_values
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
        return in_place(found, batch)


def moved_token_values(
    params: Params,
    block: Params,
    eta: float,
    batch: Batch,
    apply: Apply,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    vmapped: bool = True,
) -> TokenValues:
    """``all_token_values`` at theta + eta v for every v of a block of K directions, (K, B, T) each.

    The directions, a leading axis of every entry of ``block``, are vmapped as far as the batch leaves room for more
    than one in a pass; each has a pass of its own where they are not to be ``vmapped``.
    """
    policy, size = split_policy(apply), len(next(iter(block.values())))
    together = _together(batch, chunk_size) if vmapped else 1
    tokens = TOKENS_PER_CHUNK // together
    alone = together == 1
    pieces = (
        policy.micro_batches(batch, chunk_size)
        if alone
        else micro_batches(batch, chunk_size, policy.left_alignable, tokens)
    )

    def moved(here: Params, features: Callable[[Params, MicroBatch], Tensor]) -> TokenValues:
        found = []
        for part in pieces:
            scored = scored_features(features(here, part), part)
            found.append(
                (part, head_token_values(policy, here, scored, part.targets, temperature, MAX_LOGITS // together))
            )
        return in_place(found, batch)

    found = []
    with torch.no_grad():
        for start in range(0, size, together):
            some = {name: v[start : start + together] for name, v in block.items()}
            if alone:
                own = moved(shift(params, {name: v[0] for name, v in some.items()}, eta), policy.backbone)
                found.append(TokenValues(*(x.unsqueeze(0) for x in own)))
            else:
                found.append(vmap(lambda v: moved(shift(params, v, eta), policy.backbone_vmap))(some))
    return TokenValues(*(torch.cat(field) for field in zip(*found, strict=True)))


def _together(batch: Batch, chunk_size: int | None) -> int:
    rows_at_once = chunk_size or max(1, TOKENS_PER_CHUNK // batch.input_ids.shape[1])
    # Products with a matrix for each direction are slow ones: worth it only while one direction fills no pass.
    return max(1, rows_at_once // len(batch.input_ids))


def directions_batch(
    params: Params, batch: Batch, apply: Apply, temperature: float = 1.0, chunk_size: int | None = None
) -> bool:
    """Return whether directions fit a pass together and ``vmap`` takes them through the policy, tried with two.

    False as well where torch would go one by one inside, for want of a batching rule, which it warns of.
    """
    if len(batch.input_ids) == 0 or _together(batch, chunk_size) == 1:
        return False
    some = select_rows(batch, slice(0, 1))
    two = {name: torch.zeros_like(p).expand(2, *p.shape) for name, p in params.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop")
        try:
            moved_token_values(params, two, 0.0, some, apply, temperature, chunk_size=2)
        # Whatever a model raises for want of values or shapes, of its own exceptions too.
        except Exception:
            return False
    return True


def scored_features(features: Tensor, part: MicroBatch) -> Tensor:
    """(n, d): the features that score a completion token each, of those at all places (b, L, d)."""
    return features[part.row, part.position]


def in_place(found: Sequence[tuple[MicroBatch, TokenValues]], batch: Batch) -> TokenValues:
    """The values (..., n) of every part's tokens where they stand in the batch, (..., B, T)."""
    place = torch.cat([part.flat_index for part, _ in found])
    out = []
    for field in zip(*(values for _, values in found), strict=True):
        value = torch.cat(field, -1)
        whole = value.new_zeros(*value.shape[:-1], batch.input_ids.numel())
        out.append(whole.index_copy(-1, place, value).unflatten(-1, batch.input_ids.shape))
    return TokenValues(*out)


def weights_of(batch: Batch, part: MicroBatch) -> TokenWeights:
    """c and b of the tokens that a part scores."""
    c, b = (None if w is None else w.flatten()[part.flat_index] for w in batch[3:5])
    return c, b


def scaled_weights(batch: Batch, part: MicroBatch, policy: SplitPolicy) -> TokenWeights:
    """``weights_of`` times the policy's loss scale, by which gradients made with them are to be divided."""
    c, b = (w if w is None or policy.loss_scale == 1 else w * policy.loss_scale for w in weights_of(batch, part))
    return c, b


def surrogate(values: TokenValues, batch: Batch) -> Tensor:
    """l = -sum_t (c_t log pi(y_t) + b_t h_t), whose gradient is the loss's; terms without coefficients are left out."""
    loss = values.logprobs.new_zeros(())
    for value, weight in zip(values, (batch.coefficients, batch.entropy_coefficients), strict=True):
        if weight is not None:
            # What stands outside of completions is never read.
            loss = loss - torch.where(batch.completion_mask, weight.to(value.dtype) * value, 0.0).sum()
    return loss
