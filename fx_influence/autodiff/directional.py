"""Directional derivatives of token values: the JVP, and the second derivative of a loss along one direction."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_influence.autodiff.gradients import LinearOutputCaches
from fx_influence.autodiff.token_values import scatter_to_batch, scored_features, surrogate, token_values
from fx_influence.batching.rows import row_chunks
from fx_influence.core.tree import largest_entry, promote, shift, unit_direction
from fx_influence.policy.lm_head import head_jvp
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Params, TokenValues


def token_jvp(
    params: Params,
    direction: Params,
    batch: Batch,
    apply: Apply,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    caches: LinearOutputCaches | None = None,
) -> TokenValues:
    """Directional derivatives <d log pi(y_it)/dtheta, v> and <dh_it/dtheta, v> of every token, by forward mode.

    ``direction``: v, by name, any float dtype; names absent count as 0. Returns (B, T) each, float64 for float64
    parameters, else float32. v is scaled to unit maximum before it is cast to the parameters' dtype and the result
    scaled back, so that a huge or tiny v neither overflows nor vanishes. ``caches``: from ``gradient_with_cache`` of
    the same batch and ``chunk_size``.
    """
    policy, (scale, tangent) = split_policy(apply), unit_direction(direction, params)
    found = []
    with torch.no_grad():
        pending = policy.micro_batches(batch, chunk_size)
        for part, outputs in zip(pending, caches or [None] * len(pending), strict=True):
            both = policy.backbone_jvp(params, tangent, part, outputs)
            features, toward = (scored_features(x, part) for x in both)
            found.append((part, head_jvp(policy, params, tangent, features, toward, part.targets, temperature)))
    d = scatter_to_batch(found, batch)
    return TokenValues(d.logprobs * scale, d.entropies * scale)


def curvature(
    params: Params,
    direction: Params,
    batch: Batch,
    apply: Apply,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """d2/deta2 at 0 of sum_it (c_it log pi(y_it) + b_it h_it) at theta + eta v, float64 scalar; v: ``direction``."""
    first = next(iter(params.values()))
    scale = largest_entry(direction)
    unit = {name: v / scale for name, v in direction.items()}

    eta = torch.zeros((), dtype=promote(first.dtype), device=first.device, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    # Reverse twice: forward mode over anything fails at SiLU, and is silently wrong at LayerNorm, whose jvp treats its
    # saved mean and deviation as constants. Not by torch.func, which refuses models that write to what they hold.
    for some in row_chunks(batch, chunk_size):
        with torch.enable_grad():
            value = -surrogate(token_values(shift(params, unit, eta), some, apply, temperature), some)
            slope = _derivative(value, eta, create_graph=True)
        total += _derivative(slope, eta, create_graph=False).double()
    return total * scale**2


def _derivative(value: Tensor, eta: Tensor, create_graph: bool) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(eta)
    found = torch.autograd.grad(value, eta, create_graph=create_graph, allow_unused=True)[0]
    return torch.zeros_like(eta) if found is None else found
