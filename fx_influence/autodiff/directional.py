"""Directional derivatives: of token values, by a JVP; of a loss's gradient; and of a loss twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fx_influence.autodiff.gradients import LinearOutputCaches, as_leaves
from fx_influence.autodiff.token_values import (
    scaled_loss_weights,
    scatter_to_batch,
    scored_hidden_states,
    surrogate,
    token_values,
)
from fx_influence.batching.microbatch import MicroBatch
from fx_influence.batching.rows import row_chunks
from fx_influence.core.tree import accumulate, cast_like, largest_entry, promote, shift, unit_direction
from fx_influence.policy.attention import math_attention
from fx_influence.policy.lm_head import head_hessian_product, head_jvp, head_vjp
from fx_influence.policy.split import SplitPolicy, split_policy
from fx_influence.types import Apply, Batch, Gradients, Params, TokenValues


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
            derivatives.append(
                (micro_batch, micro_batch_jvp(policy, params, tangent, micro_batch, outputs, temperature))
            )
    d = scatter_to_batch(derivatives, batch)
    return TokenValues(d.logprobs * scale, d.entropies * scale)


def micro_batch_jvp(
    policy: SplitPolicy,
    params: Params,
    tangent: Params,
    micro_batch: MicroBatch,
    outputs: Sequence[Tensor] | None,
    temperature: float,
) -> TokenValues:
    """Return the derivatives of a micro-batch's token values along ``tangent``, (n,) each.

    Args:
        policy: the split policy.
        params: theta, by name.
        tangent: by name, from ``unit_direction``.
        micro_batch: the tokens to score.
        outputs: linear layers' outputs over the same micro-batch, or None.
        temperature: divisor of the logits.
    """
    hidden_and_tangent = policy.backbone_jvp(params, tangent, micro_batch, outputs)
    hidden, d_hidden = (scored_hidden_states(x, micro_batch) for x in hidden_and_tangent)
    return head_jvp(policy, params, tangent, hidden, d_hidden, micro_batch.targets, temperature)


def hessian_product(
    params: Params,
    direction: Params,
    batch: Batch,
    apply: Apply,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    slopes: Tensor | None = None,
) -> Gradients:
    """Return the derivative along v of the batch's gradient g = -sum_it (c_it grad log pi(y_it) + b_it grad h_it).

    It is that of g as a function of theta: b is constant, and c_it follows the policy by its slope e_it,

        -sum_it [c_it Hess log pi + e_it grad log pi (grad log pi)^T + b_it Hess h] v

    so e = c for an importance ratio with a fixed denominator, c = a pi / pi_old, and e = 0 for c that is the same
    whatever the policy. Either way the matrix is symmetric.

    The backbone's hidden states x(theta) and the loss F of the head give J^T (d/dv of dF/dx) + d/dtheta <J^T dF/dx, v>,
    the latter with dF/dx fixed: a JVP of the backbone, and a reverse pass over a reverse pass. Logits exist a chunk of
    tokens at a time.

    Args:
        params: theta, by name.
        direction: v, by name, any float dtype; names absent count as 0.
        batch: rollouts with c = ``coefficients`` and b = ``entropy_coefficients``, (B, T) each.
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
        chunk_size: rows per forward; None chooses by tokens.
        slopes: e_it = dc_it / dlog pi(y_it), (B, T), read at completion tokens alone; None for 0.

    Returns:
        One tensor per parameter, at least float32, and None where no derivative reaches the parameter.
    """
    policy, leaves = split_policy(apply), as_leaves(params)
    scale, tangent = unit_direction(direction, params)
    total: Gradients = dict.fromkeys(params)
    for micro_batch in policy.micro_batches(batch, chunk_size):
        weights = scaled_loss_weights(batch, micro_batch, policy)
        slope = None if slopes is None else slopes.flatten()[micro_batch.flat_index] * policy.loss_scale
        with torch.no_grad():
            _, d_hidden = policy.backbone_jvp(params, tangent, micro_batch, None)
            d_hidden = scored_hidden_states(d_hidden, micro_batch)
        # Fused attention kernels and compiled graphs have no second backward pass.
        with torch.enable_grad(), math_attention():
            if policy.compiled:
                states = policy.backbone_eager(leaves, micro_batch.input_ids, micro_batch.attention_mask)
            else:
                states = policy.backbone(leaves, micro_batch)
            hidden = scored_hidden_states(states, micro_batch)
        head = policy, leaves, tangent, hidden.detach(), d_hidden, micro_batch.targets, weights, slope, temperature
        d_cotangent, d_head = head_hessian_product(*head)
        accumulate(total, d_head.items())
        if hidden.requires_grad:
            cotangent, _ = head_vjp(policy, leaves, hidden, micro_batch.targets, weights, temperature)
            accumulate(total, _backbone_product(hidden, cotangent, d_cotangent, leaves, tangent).items())
    return {name: x if x is None else x.mul_(scale / policy.loss_scale) for name, x in total.items()}


def _backbone_product(
    hidden: Tensor, cotangent: Tensor, d_cotangent: Tensor, leaves: Params, tangent: Params
) -> Gradients:
    """Return J^T d_cotangent + d/dtheta <J^T cotangent, v>, J that of hidden states with respect to the leaves.

    Args:
        hidden: (n, d), with its graph.
        cotangent: (n, d), held fixed.
        d_cotangent: (n, d), its derivative along v.
        leaves: theta by name.
        tangent: v by name; names absent count as 0.
    """
    # Reverse over reverse; forward mode over reverse mode is silently wrong at LayerNorm, see ``curvature``.
    with torch.enable_grad():
        gradient = torch.autograd.grad(hidden, list(leaves.values()), cotangent, create_graph=True, allow_unused=True)
        terms = [
            (g * cast_like(tangent[name], leaf)).sum()
            for (name, leaf), g in zip(leaves.items(), gradient, strict=True)
            if g is not None and name in tangent and g.requires_grad
        ]
    outputs, cotangents = [hidden, *terms], [d_cotangent, *map(torch.ones_like, terms)]
    return dict(
        zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True), strict=True)
    )


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
