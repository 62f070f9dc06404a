"""Token values at perturbed parameters theta + eta v, for several directions v in one vmapped pass where it pays."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from fx_influence.autodiff.token_values import scatter_to_batch, scored_hidden_states
from fx_influence.batching.microbatch import TOKENS_PER_CHUNK, MicroBatch, micro_batches
from fx_influence.batching.rows import select_rows
from fx_influence.core.tree import shift
from fx_influence.policy.lm_head import head_token_values
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Params, TokenValues


def perturbed_token_values(
    params: Params,
    directions: Params,
    eta: float,
    batch: Batch,
    apply: Apply,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    vmapped: bool = True,
) -> TokenValues:
    """Return ``all_token_values`` at theta + eta v for every direction v of a block.

    Args:
        params: theta, by name.
        directions: block of K directions by name, a leading axis of every entry; names absent count as 0.
        eta: step size.
        batch: rollouts (B, T).
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
        chunk_size: rows times directions per forward; None chooses by tokens.
        vmapped: whether directions share a pass by ``vmap`` where the batch fills less than one; else each has its own.

    Returns:
        ``TokenValues``, (K, B, T) each.
    """
    policy, count = split_policy(apply), len(next(iter(directions.values())))
    per_pass = _directions_per_pass(batch, chunk_size) if vmapped else 1
    if per_pass == 1:
        pending = policy.micro_batches(batch, chunk_size)
    else:
        pending = micro_batches(batch, chunk_size, policy.left_alignable, TOKENS_PER_CHUNK // per_pass)

    def evaluate(perturbed: Params, backbone: Callable[[Params, MicroBatch], Tensor]) -> TokenValues:
        values = []
        for micro_batch in pending:
            hidden = scored_hidden_states(backbone(perturbed, micro_batch), micro_batch)
            max_logits = policy.max_logits // per_pass
            scored = head_token_values(policy, perturbed, hidden, micro_batch.targets, temperature, max_logits)
            values.append((micro_batch, scored))
        return scatter_to_batch(values, batch)

    by_pass = []
    with torch.no_grad():
        for start in range(0, count, per_pass):
            block = {name: v[start : start + per_pass] for name, v in directions.items()}
            if per_pass == 1:
                values = evaluate(shift(params, {name: v[0] for name, v in block.items()}, eta), policy.backbone)
                by_pass.append(TokenValues(*(x.unsqueeze(0) for x in values)))
            else:
                by_pass.append(vmap(lambda v: evaluate(shift(params, v, eta), policy.backbone_vmap))(block))
    return TokenValues(*(torch.cat(field) for field in zip(*by_pass, strict=True)))


def _directions_per_pass(batch: Batch, chunk_size: int | None) -> int:
    rows_per_pass = chunk_size or max(1, TOKENS_PER_CHUNK // batch.input_ids.shape[1])
    # Batched products with one matrix per direction are slow: they pay only while one direction fills no pass.
    return max(1, rows_per_pass // len(batch.input_ids))


def can_vmap_directions(
    params: Params, batch: Batch, apply: Apply, temperature: float = 1.0, chunk_size: int | None = None
) -> bool:
    """Return whether several directions fit one pass and ``vmap`` takes them through the policy, tried with two.

    It is False too where an operation has no batching rule, so that torch would loop over directions with a warning.

    Args:
        params: theta, by name.
        batch: rollouts (B, T); the first row is tried.
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
        chunk_size: rows times directions per forward; None chooses by tokens.
    """
    if len(batch.input_ids) == 0 or _directions_per_pass(batch, chunk_size) == 1:
        return False
    first_row = select_rows(batch, slice(0, 1))
    two = {name: torch.zeros_like(p).expand(2, *p.shape) for name, p in params.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop")
        try:
            perturbed_token_values(params, two, 0.0, first_row, apply, temperature, chunk_size=2)
        # A model may raise anything, its own exceptions too, where vmap hides values or shapes.
        except Exception:
            return False
    return True
