"""The losses of U's rollouts to first order: their gradient, and their derivatives along directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.autodiff.engine import Engine
from fx_influence.autodiff.ghost import DirectionPlan, TokenDirections, plan_directions
from fx_influence.autodiff.gradients import LinearOutputCaches
from fx_influence.batching.rows import group_of_rows, has_loss, rows_by_group, select_rows
from fx_influence.core.tree import Direction
from fx_influence.types import Batch, Gradients, Params, TokenValues


class Derivatives(NamedTuple):
    """Derivatives of the rollouts' losses along K directions, all float64.

    Attributes:
        rows: (K, n_u, T) by token, or (K, n_u, 1).
        parts: (P, K, n_u), of the losses' parts; none where ``rows`` are by token.
        tokens: (n_u, T), of each group of rows along its own direction, or None.
    """

    rows: Tensor
    parts: Tensor
    tokens: Tensor | None


class LinearizedLosses(NamedTuple):
    """The losses of U's rollouts to first order: the gradient of their sum, and their derivatives along directions.

    Attributes:
        gradient: of the sum, or the trainer's own.
        differentiate: at most ``plan.at_once`` u_k, and a direction for each group of rows, or None -> <u_k, g_i>, by
            token where ``resolves_tokens``, else from ghost products, with which the tokens' JVP shares its forward.
        token_jvp: u -> (n_u, T), float64 as all derivatives.
        token_jvp_of: (u, rows) -> (len(rows), T), those of some rows.
        resolves_tokens: whether ``differentiate`` has derivatives by token.
        plan: how the directions are to be held.
        rows: the places in U of the rows that have a loss, int64, ascending; one at least.
        batch: these rows, whose gradient is that of all.
        shape: (n_u, T).
    """

    gradient: Gradients
    differentiate: Callable[[Sequence[Direction], TokenDirections | None], Derivatives]
    token_jvp: Callable[[Direction], Tensor]
    token_jvp_of: Callable[[Direction, Tensor], Tensor]
    resolves_tokens: bool
    plan: DirectionPlan
    rows: Tensor
    batch: Batch
    shape: torch.Size

    def jvp(self, directions: Sequence[Direction]) -> Tensor:
        """Return the derivatives of rows, or of their tokens, along at most ``plan.at_once`` directions."""
        return self.differentiate(directions, None).rows


def linearize_update(
    params: Params,
    batch_u: Batch,
    grad: Gradients | None,
    engine: Engine,
    num_directions: int,
    per_token: bool,
    memory_budget: int,
    groups: Sequence[Tensor] | None = None,
    parts: Sequence[Batch] = (),
) -> LinearizedLosses:
    """Return U's losses to first order, by ghost products or by JVPs, over the rows that have a loss.

    Ghost products serve where several directions are wanted, or neither tokens nor a given gradient; JVPs serve
    elsewhere, and where a parameter has no layer IO. Rows without a loss have derivatives of 0 and take no pass.

    Args:
        params: theta by name.
        batch_u: update batch, n_u rows with coefficients.
        grad: the gradient of the sum where the trainer has it; None computes it here.
        engine: engine of the policy as the trainer computes it.
        num_directions: number of directions along which derivatives are wanted by row, three with a matrix: u, its
            fresh coordinates, and the gradient of E's length; 0 where those by token do.
        per_token: whether those of tokens are wanted.
        memory_budget: bytes of directions, and bytes of the reverse pass to cache for the derivatives.
        groups: index tensors of the rows whose tokens have a direction in common; None is one group of all rows.
        parts: U with the coefficients of further losses, of which derivatives by row are wanted too.
    """
    rows, count = has_loss(batch_u).nonzero().squeeze(-1), len(batch_u.input_ids)
    # Where no row has a loss, the first one shows which parameters a loss would reach.
    rows = rows if len(rows) else rows.new_zeros(1)
    options = params, grad, engine, num_directions, per_token, memory_budget
    if len(rows) == count:
        return _linearize_rows(batch_u, groups, parts, *options)
    places = None if groups is None else rows_by_group(group_of_rows(groups, batch_u)[rows], len(groups))
    linearized = _linearize_rows(select_rows(batch_u, rows), places, [select_rows(x, rows) for x in parts], *options)

    def differentiate(directions: Sequence[Direction], of_tokens: TokenDirections | None) -> Derivatives:
        by_row, by_part, tokens = linearized.differentiate(directions, of_tokens)
        return Derivatives(
            _scattered(by_row, 1, rows, count),
            _scattered(by_part, 2, rows, count),
            None if tokens is None else _scattered(tokens, 0, rows, count),
        )

    def token_jvp(u: Direction) -> Tensor:
        return _scattered(linearized.token_jvp(u), 0, rows, count)

    def token_jvp_of(u: Direction, index: Tensor) -> Tensor:
        wanted = torch.isin(index, rows).nonzero().squeeze(-1)
        if not len(wanted):
            return torch.zeros_like(batch_u.input_ids[index], dtype=torch.float64)
        places = torch.searchsorted(rows, index[wanted])
        return _scattered(linearized.token_jvp_of(u, places), 0, wanted, len(index))

    return linearized._replace(
        differentiate=differentiate,
        token_jvp=token_jvp,
        token_jvp_of=token_jvp_of,
        rows=rows,
        shape=batch_u.input_ids.shape,
    )


def _scattered(x: Tensor, axis: int, rows: Tensor, count: int) -> Tensor:
    """Return ``x`` with its entries at ``rows`` of ``count`` along an axis, the others 0."""
    out = x.new_zeros(*x.shape[:axis], count, *x.shape[axis + 1 :])
    return out.index_copy_(axis, rows, x)


def _linearize_rows(
    batch: Batch,
    groups: Sequence[Tensor] | None,
    parts: Sequence[Batch],
    params: Params,
    grad: Gradients | None,
    engine: Engine,
    num_directions: int,
    per_token: bool,
    memory_budget: int,
) -> LinearizedLosses:
    """Return the losses of all rows of a batch to first order; the arguments are those of ``linearize_update``."""
    every_row = torch.arange(len(batch.input_ids), device=batch.input_ids.device)

    def token_jvp(u: Direction, caches: LinearOutputCaches | None = None) -> Tensor:
        return u.scale * token_derivatives(params, u.unit, batch, engine, caches)

    def token_jvp_of(u: Direction, rows: Tensor) -> Tensor:
        return u.scale * token_derivatives(params, u.unit, select_rows(batch, rows), engine, None)

    if num_directions or not (per_token or grad is not None):
        plan = plan_directions(params, max(2, num_directions), memory_budget)
        if num_directions < 2 and plan.dtype is not None:
            # u alone is not rounded; its coordinates of fresh denominators take its place where both do not fit.
            plan = DirectionPlan(1, None)
        at_once = max(1, min(num_directions, plan.at_once))
        linearized = engine.linearize(params, batch, memory_budget, at_once, grad is None, groups, parts)
        if linearized is not None:
            gradient, ghost_products = linearized

            def differentiate(directions: Sequence[Direction], of_tokens: TokenDirections | None) -> Derivatives:
                rows, by_part, values = ghost_products([u.unit for u in directions], of_tokens)
                scales = rows.new_tensor([u.scale for u in directions]).unsqueeze(1)
                tokens = None if values is None else losses_of_tokens(values, batch)
                return Derivatives((rows * scales).unsqueeze(-1), by_part * scales, tokens)

            return LinearizedLosses(
                gradient=gradient if grad is None else grad,
                differentiate=differentiate,
                token_jvp=token_jvp,
                token_jvp_of=token_jvp_of,
                resolves_tokens=False,
                plan=plan,
                rows=every_row,
                batch=batch,
                shape=batch.input_ids.shape,
            )
    caches: LinearOutputCaches | None = None
    if grad is None:
        grad, caches = engine.gradient_with_cache(params, batch, memory_budget)
    cached_token_jvp = partial(token_jvp, caches=caches)

    def differentiate_tokens(directions: Sequence[Direction], of_tokens: TokenDirections | None) -> Derivatives:
        rows = torch.stack([cached_token_jvp(u) for u in directions])
        return Derivatives(rows, rows.new_zeros(0, *rows.shape[:2]), None)

    return LinearizedLosses(
        gradient=grad,
        differentiate=differentiate_tokens,
        token_jvp=cached_token_jvp,
        token_jvp_of=token_jvp_of,
        resolves_tokens=True,
        plan=DirectionPlan(1, None),
        rows=every_row,
        batch=batch,
        shape=batch.input_ids.shape,
    )


def token_derivatives(
    params: Params, u: Params, batch: Batch, engine: Engine, caches: LinearOutputCaches | None
) -> Tensor:
    """Return each token's term of <u, g_i>, -(c_it dlogp_it + b_it dh_it), float64 (n, T).

    Args:
        params: theta by name.
        u: direction by name; names absent count as 0.
        batch: (n, T), with coefficients.
        engine: engine of the policy.
        caches: linear layers' outputs over the same batch, from ``gradient_with_cache``, or None.
    """
    return losses_of_tokens(engine.jvp(params, u, batch, caches), batch)


def losses_of_tokens(derivatives: TokenValues, batch: Batch) -> Tensor:
    """Return -(c_it dlogp_it + b_it dh_it) from the derivatives of the token values, float64 (n, T)."""
    total = torch.zeros(batch.input_ids.shape, dtype=torch.float64, device=batch.input_ids.device)
    for d, weight in zip(derivatives, (batch.coefficients, batch.entropy_coefficients), strict=True):
        if weight is not None:
            # Values outside completions may be anything, NaN included.
            total -= torch.where(batch.completion_mask, weight.double() * d.double(), 0.0)
    return total
