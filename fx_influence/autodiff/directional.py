"""Directional derivatives of token values: the JVP, and the second derivative of a loss along one direction."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_influence.autodiff.gradients import LinearOutputCaches
from fx_influence.autodiff.token_values import scatter_to_batch, scored_hidden_states, surrogate, token_values
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
    """Return <d log pi(y_it)/dtheta, v> and <dh_it/dtheta, v> of every token, by forward mode.

    v is scaled to unit maximum before it is cast to the parameters' dtype and the result is scaled back, so that a huge
    or tiny v neither overflows nor vanishes.

    Args:
        params: theta, by name.
        direction: v, by name, any float dtype; names absent count as 0.
        batch: rollouts (B, T).
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
        chunk_size: rows per forward; None chooses by tokens.
        caches: linear layers' outputs from ``gradient_with_cache`` of the same batch and ``chunk_size``, or None.

    Returns:
        ``TokenValues`` of derivatives, (B, T) each, float64 for float64 parameters, else float32.
    """
    policy, (scale, tangent) = split_policy(apply), unit_direction(direction, params)
    derivatives = []
    with torch.no_grad():
        pending = policy.micro_batches(batch, chunk_size)
        for micro_batch, outputs in zip(pending, caches or [None] * len(pending), strict=True):
            hidden_and_tangent = policy.backbone_jvp(params, tangent, micro_batch, outputs)
            hidden, d_hidden = (scored_hidden_states(x, micro_batch) for x in hidden_and_tangent)
            d_values = head_jvp(policy, params, tangent, hidden, d_hidden, micro_batch.targets, temperature)
            derivatives.append((micro_batch, d_values))
    d = scatter_to_batch(derivatives, batch)
    return TokenValues(d.logprobs * scale, d.entropies * scale)


def curvature(
    params: Params,
    direction: Params,
    batch: Batch,
    apply: Apply,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Return d2/deta2 at eta = 0 of sum_it (c_it log pi(y_it) + b_it h_it) at theta + eta v, float64 scalar.

    Args:
        params: theta, by name.
        direction: v, by name; names absent count as 0.
        batch: rollouts with c = ``coefficients`` and b = ``entropy_coefficients``, (B, T) each.
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
        chunk_size: rows per forward; None chooses by tokens.
    """
    first_parameter = next(iter(params.values()))
    scale = largest_entry(direction)
    unit = {name: v / scale for name, v in direction.items()}

    eta = torch.zeros((), dtype=promote(first_parameter.dtype), device=first_parameter.device, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64, device=first_parameter.device)
    # Reverse over reverse, because forward mode over either mode fails at SiLU and is silently wrong at LayerNorm
    # (torch 2.13), whose jvp treats its saved mean and deviation as constants. It goes by autograd, because torch.func
    # refuses models that write to their own tensors.
    for chunk in row_chunks(batch, chunk_size):
        with torch.enable_grad():
            value = -surrogate(token_values(shift(params, unit, eta), chunk, apply, temperature), chunk)
            derivative = _derivative(value, eta, create_graph=True)
        total += _derivative(derivative, eta, create_graph=False).double()
    return total * scale**2


def _derivative(value: Tensor, eta: Tensor, create_graph: bool) -> Tensor:
    """Return d value / d eta, 0 where ``value`` does not depend on ``eta``."""
    if not value.requires_grad:
        return torch.zeros_like(eta)
    derivative = torch.autograd.grad(value, eta, create_graph=create_graph, allow_unused=True)[0]
    return torch.zeros_like(eta) if derivative is None else derivative
