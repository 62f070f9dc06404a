"""Derivatives of the rollouts' losses along the objective's preconditioned gradient, by groups of E."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.attribution.cross_fitting import EvaluationGroups
from fx_influence.attribution.linearized_losses import Derivatives, LinearizedLosses
from fx_influence.attribution.objective_gradients import Evaluation
from fx_influence.autodiff.ghost import DirectionPlan, plan_directions
from fx_influence.batching.rows import rows_by_group
from fx_influence.core.tree import Direction, DirectionDifference
from fx_influence.estimators.deviations import NOTHING_LEFT_OUT, left_out_parts
from fx_influence.optim.step import AdamWStep, InnerProducts, add_inner_products
from fx_influence.types import Params


class LengthSlopes(NamedTuple):
    """Derivatives of log E[T]: ``tokens`` (n_u, T) or (n_u, 1), along each token's or rollout's part of the step;
    ``parts`` (P, n_u), along those of the losses' parts; and ``along_step``, a scalar. float64."""

    tokens: Tensor
    parts: Tensor
    along_step: Tensor


class GroupDerivatives(NamedTuple):
    """Derivatives of the rollouts' losses, and of the step, along u_k = gain * grad H_k of the K groups of E.

    Those by group are along gain * (grad H_k - x_k L), see ``Evaluation``, whose sum over groups is u as well.

    Attributes:
        u: the sum of the u_k.
        derivatives: <u_k, g_i>, (K, n_u, T) or (K, n_u, 1), float64; see ``LinearizedLosses.differentiate``.
        parts: (P, K, n_u), likewise of the losses' parts; none where ``derivatives`` are by token.
        tokens: <u, g_it>, (n_u, T), float64, or where ``own_tokens`` is None <u - u_k, g_it> with k the row's own
            group; None where they were not made with the groups'.
        token_derivatives: <u_k, g_it>, (K, n_u, T), float64; None where they are not known.
        own_tokens: <u_k, g_it> of each row's own group k by token, (n_u, T), 0 where it has none; None where
            ``tokens`` do without them.
        along_step: (K,), <grad H_k, v>, float64.
        on_step: inner products of grad H with the step's terms.
        update_products: <u, g> by parameter name, float64 scalars.
        on_fresh: <u, g_i> on coordinates of fresh denominators, see ``AdamWStep.keep_fresh_``, (n_u,), float64; None
            where it was not made with the groups'.
        slopes: derivatives of log E[T], where they were made; else None.
        narrowed: whether the u_k, or their sum u, were rounded in half precision, so that ``derivatives`` are along
            other directions than u and serve error bars alone.
    """

    u: Direction
    derivatives: Tensor
    parts: Tensor
    tokens: Tensor | None
    token_derivatives: Tensor | None
    own_tokens: Tensor | None
    along_step: Tensor
    on_step: InnerProducts
    update_products: dict[str, Tensor]
    on_fresh: Tensor | None
    slopes: LengthSlopes | None
    narrowed: bool


def differentiate_by_group(
    evaluation: Evaluation,
    update: LinearizedLosses,
    step: AdamWStep,
    groups: EvaluationGroups,
    per_token: bool,
    needs_slopes: bool,
    labels_by_token: bool,
    folds: Sequence[Tensor] | None,
    dtype: torch.dtype | None,
    offload: torch.device | str | None,
) -> GroupDerivatives:
    """Return the derivatives along each group's direction, with no more directions in memory than ``update`` plans for.

    Where a vector more than these fits the budget, L is taken off each group's gradient. Where it does not, gain * L
    goes through U's map first, by token only where a group's direction does, and its derivatives l are taken off those
    of the groups: x_k l from the k-th. Either way nothing is rounded for it. The last
    pass over U takes what u itself is wanted for along.

    Args:
        evaluation: the objective's gradients by group, which are used up.
        update: U's losses to first order.
        step: the optimizer's step.
        groups: of E's rows, and the one that each row of U leaves out.
        per_token: whether the derivatives along that one are wanted by token.
        needs_slopes: whether the derivatives of log E[T] are wanted.
        labels_by_token: whether the derivatives along each group's direction are wanted by token.
        folds: see ``folds_of_tokens``.
        dtype: of u; None keeps that of the gradients.
        offload: device that holds the directions; None leaves them where the gradients are.
    """
    several, adds_up = groups.num_groups > 1, groups.num_groups > 1 and not evaluation.has_sum
    all_by_token = labels_by_token and not update.resolves_tokens
    own_by_token = groups.leave_out and per_token and not update.resolves_tokens and folds is None
    slopes: LengthSlopes | None = None
    length_gradient = evaluation.next_length_gradient()
    if length_gradient is not None and evaluation.has_sum:
        slopes = _length_slopes(length_gradient, update, step, own_by_token or all_by_token)
        length_gradient = None
    gradients = evaluation.deviating_gradients(length_gradient)
    products: list[InnerProducts] = []
    derivatives: list[Derivatives] = []
    pending: list[Direction] = []
    total: Params = {}
    by_token: list[Tensor] = []
    own_tokens = torch.zeros(update.shape, dtype=torch.float64, device=groups.group.device)
    rows_left_out = rows_by_group(groups.left_out, groups.num_groups)
    # Where all directions are to be in memory as they are, so may be their gradients.
    at_once = update.plan.at_once if several and update.plan.dtype is None else 1
    preconditioned: list[Params] = []
    for k in range(groups.num_groups):
        if not preconditioned:
            # Not by zip or a loop over the gradients, which would hold one while the next is made.
            preconditioned = [next(gradients) for _ in range(min(at_once, groups.num_groups - k))]
            # From here on the gradients' memory holds gain * gradient.
            products.extend(step.precondition_all_(preconditioned))
        direction = Direction.of_(preconditioned.pop(0))
        if all_by_token:
            by_token.append(update.token_jvp(direction))
            own_tokens[rows_left_out[k]] = by_token[-1][rows_left_out[k]]
        elif own_by_token and len(rows_left_out[k]):
            own_tokens[rows_left_out[k]] = update.token_jvp_of(direction, rows_left_out[k])
        if adds_up:
            direction.add_to_(total, offload)
        pending.append(direction.to_(update.plan.dtype if several else dtype, offload))
        if len(pending) == update.plan.at_once and k < groups.num_groups - 1:
            derivatives.append(update.differentiate(pending, None))
            pending = []
        # Freed before the next group's gradient is made.
        del direction
    if not needs_slopes:
        length_gradient = None
    del gradients
    u = Direction.of_(total) if adds_up else None if several else pending[0]
    last = _with_tokens(update, step, pending, length_gradient, u, per_token, folds)
    pending = []
    derivatives.append(last.derivatives)
    by_group = torch.cat([x.rows for x in derivatives])
    parts = torch.cat([x.parts for x in derivatives], 1)
    excess = by_group.new_tensor(evaluation.group_excess)
    along_step = torch.stack([p.direction for p in products])
    token_derivatives = torch.stack(by_token) if by_token else None
    if slopes is not None:
        by_row = slopes.tokens if update.resolves_tokens else slopes.tokens.sum(-1, keepdim=True)
        by_group = by_group - _multiples(excess, by_row)
        along_step = along_step - excess * slopes.along_step
        if token_derivatives is not None:
            token_derivatives = token_derivatives - _multiples(excess, slopes.tokens)
        parts = parts - _multiples(excess, slopes.parts).transpose(0, 1)
        if own_by_token or all_by_token:
            own_tokens -= left_out_parts(_multiples(excess, slopes.tokens), groups.left_out)
    if u is None:
        total = next(evaluation.gradients)
        step.precondition_(total)
        u = Direction.of_(total).to_(dtype, offload)
    return GroupDerivatives(
        u=u,
        derivatives=by_group,
        parts=parts,
        tokens=last.derivatives.tokens,
        token_derivatives=by_group if update.resolves_tokens else token_derivatives,
        own_tokens=None if folds is not None and last.derivatives.tokens is not None else own_tokens,
        along_step=along_step,
        on_step=add_inner_products(products),
        update_products=step.update_products(u),
        on_fresh=last.on_fresh,
        slopes=slopes if last.slopes is None else last.slopes,
        narrowed=several and (dtype or update.plan.dtype) is not None,
    )


def folds_of_tokens(
    params: Params, groups: EvaluationGroups, only_tokens: bool, dtype: torch.dtype | None, memory_budget: int
) -> Sequence[Tensor] | None:
    """Return the rows of U by the group that they leave out, those that leave out none last; None to keep them as one.

    Where the directions of all groups fit the budget in full precision, a row's tokens can meet u less that of its own
    group, so that one JVP over U gives the influences of tokens.

    Args:
        params: theta by name.
        groups: of E's rows, and the one that each row of U leaves out.
        only_tokens: whether the influences of tokens are wanted, and nothing else needs derivatives along u by token.
        dtype: of the directions; None keeps that of the gradients.
        memory_budget: bytes of directions.
    """
    plan = plan_directions(params, groups.num_groups, memory_budget)
    in_full = dtype is None and plan == DirectionPlan(groups.num_groups, None)
    if not (only_tokens and groups.leave_out and in_full):
        return None
    left_out = torch.where(groups.left_out == NOTHING_LEFT_OUT, groups.num_groups, groups.left_out)
    return rows_by_group(left_out, groups.num_groups + 1)


class _LastDerivatives(NamedTuple):
    """Derivatives along the last groups' directions, and along u and gain * L; see ``GroupDerivatives``."""

    derivatives: Derivatives
    on_fresh: Tensor | None
    slopes: LengthSlopes | None


def _with_tokens(
    update: LinearizedLosses,
    step: AdamWStep,
    pending: Sequence[Direction],
    length_gradient: Params | None,
    u: Direction | None,
    per_token: bool,
    folds: Sequence[Tensor] | None,
) -> _LastDerivatives:
    """Return the derivatives along the last directions, with those that need u or L from the same pass over U.

    Args:
        update: U's losses to first order.
        step: the optimizer's step.
        pending: the last groups' directions, all of them with ``folds``.
        length_gradient: L, where its derivatives are wanted, and whose memory is reused; else None.
        u: the sum of all groups' directions; None where it is not there yet.
        per_token: whether derivatives by token are wanted.
        folds: see ``folds_of_tokens``.
    """
    directions = list(pending)
    along_step: Tensor | None = None
    if length_gradient is not None:
        along_step = step.precondition_(length_gradient).direction
        directions.append(Direction.of_(length_gradient))
    of_tokens: list[DirectionDifference] | None = None
    measures_fresh = u is not None and not update.resolves_tokens and update.plan.at_once > 1
    if u is not None and not update.resolves_tokens:
        if measures_fresh:
            fresh = {name: x.clone() for name, x in u.unit.items()}
            step.keep_fresh_(fresh)
            unit = Direction.of_(fresh)
            directions.append(unit._replace(scale=u.scale * unit.scale))
        if per_token:
            left_out = [] if folds is None else pending
            of_tokens = [*(DirectionDifference(u, x) for x in left_out), DirectionDifference(u)]
    rows, parts, tokens = update.differentiate(directions, of_tokens)
    count = len(pending)
    return _LastDerivatives(
        derivatives=Derivatives(rows[:count], parts[:, :count], tokens),
        on_fresh=rows[-1].sum(-1) if measures_fresh else None,
        slopes=None if along_step is None else LengthSlopes(rows[count], parts[:, count], along_step),
    )


def _length_slopes(length_gradient: Params, update: LinearizedLosses, step: AdamWStep, by_token: bool) -> LengthSlopes:
    """Return the derivatives of log E[T] from its gradient, whose memory is reused; ``by_token`` asks for those."""
    along_step = step.precondition_(length_gradient).direction
    direction = Direction.of_(length_gradient)
    rows, parts, _ = update.differentiate([direction], None)
    return LengthSlopes(update.token_jvp(direction) if by_token else rows[0], parts[:, 0], along_step)


def _multiples(excess: Tensor, slope: Tensor) -> Tensor:
    """Return x_k times the slopes (...) for every group, (K, ...)."""
    return excess.reshape(-1, *[1] * slope.ndim) * slope
