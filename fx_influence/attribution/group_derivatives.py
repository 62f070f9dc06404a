"""Derivatives of the rollouts' losses along the objective's preconditioned gradient, by groups of E."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.attribution.cross_fitting import EvaluationGroups
from fx_influence.attribution.labelled_losses import LabelledLosses
from fx_influence.attribution.linearized_losses import LinearizedLosses
from fx_influence.attribution.objective_gradients import Evaluation
from fx_influence.batching.rows import rows_by_group
from fx_influence.core.tree import Direction
from fx_influence.optim.step import AdamWStep, InnerProducts, add_inner_products
from fx_influence.types import Params


class GroupDerivatives(NamedTuple):
    """Derivatives of the rollouts' losses, and of the step, along u_k = gain * grad H_k of the K groups of E.

    Attributes:
        u: the sum of the u_k.
        derivatives: <u_k, g_i>, (K, n_u, T) or (K, n_u, 1), float64; see ``LinearizedLosses.jvp``.
        token_derivatives: <u_k, g_it>, (K, n_u, T), float64; None where they are not known.
        label_products: <u_k, .> with the gradients of labels, (K, number of them), float64; None where there are none.
        own_tokens: <u_k, g_it> of each row's own group k by token, (n_u, T), 0 where it has none.
        along_step: (K,), <grad H_k, v>, float64.
        on_step: inner products of grad H with the step's terms.
        update_products: <u, g> by parameter name, float64 scalars.
        narrowed: whether the u_k, or their sum u, were rounded in half precision, so that ``derivatives`` are along
            other directions than u and serve error bars alone.
    """

    u: Direction
    derivatives: Tensor
    token_derivatives: Tensor | None
    label_products: Tensor | None
    own_tokens: Tensor
    along_step: Tensor
    on_step: InnerProducts
    update_products: dict[str, Tensor]
    narrowed: bool


def differentiate_by_group(
    evaluation: Evaluation,
    update: LinearizedLosses,
    step: AdamWStep,
    groups: EvaluationGroups,
    per_token: bool,
    labelled: LabelledLosses,
    dtype: torch.dtype | None,
    offload: torch.device | str | None,
) -> GroupDerivatives:
    """Return the derivatives along each group's direction, with no more directions in memory than ``update`` plans for.

    Args:
        evaluation: the objective's gradients by group, which are used up.
        update: U's losses to first order.
        step: the optimizer's step.
        groups: of E's rows, and the one that each row of U leaves out.
        per_token: whether the derivatives along that one are wanted by token.
        labelled: how the sums over labels of tokens are differentiated.
        dtype: of u; None keeps that of the gradients.
        offload: device that holds the directions; None leaves them where the gradients are.
    """
    several = groups.num_groups > 1
    own_by_token = groups.leave_out and per_token and not update.resolves_tokens
    products: list[InnerProducts] = []
    derivatives: list[Tensor] = []
    pending: list[Direction] = []
    total: Params = {}
    by_token: list[Tensor] = []
    by_label: list[Tensor] = []
    own_tokens = torch.zeros(update.shape, dtype=torch.float64, device=groups.group.device)
    rows_left_out = rows_by_group(groups.left_out, groups.num_groups)
    for gradient in evaluation.gradients:
        # Not by enumerate, whose tuple would hold one gradient while the next is made.
        k = len(products)
        # From here on the gradient's memory holds gain * gradient.
        products.append(step.precondition_(gradient))
        direction = Direction.of_(gradient)
        if labelled.by_token and not update.resolves_tokens:
            by_token.append(update.token_jvp(direction))
            own_tokens[rows_left_out[k]] = by_token[-1][rows_left_out[k]]
        elif own_by_token and len(rows_left_out[k]):
            own_tokens[rows_left_out[k]] = update.token_jvp_of(direction, rows_left_out[k])
        by_label.extend([direction.scale * labelled.products(direction.unit)] if labelled.gradients else [])
        if several:
            direction.add_to_(total, offload)
        pending.append(direction.to_(update.plan.dtype if several else dtype, offload))
        if len(pending) == update.plan.at_once:
            derivatives.append(update.jvp(pending))
            pending = [] if several else pending
        # Freed before the next group's gradient is made.
        del gradient, direction
    if several and pending:
        derivatives.append(update.jvp(pending))
    u = Direction.of_(total) if several else pending[0]
    by_group = torch.cat(derivatives)
    return GroupDerivatives(
        u=u,
        derivatives=by_group,
        token_derivatives=by_group if update.resolves_tokens else torch.stack(by_token) if by_token else None,
        label_products=torch.stack(by_label) if by_label else None,
        own_tokens=own_tokens,
        along_step=torch.stack([p.direction for p in products]),
        on_step=add_inner_products(products),
        update_products=step.update_products(u),
        narrowed=several and (dtype or update.plan.dtype) is not None,
    )
