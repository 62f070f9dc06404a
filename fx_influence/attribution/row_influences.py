"""Influences of rollouts and tokens from the derivatives by group of E, and the identity that their sum must obey."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.attribution.group_derivatives import GroupDerivatives
from fx_influence.attribution.linearized_losses import LinearizedLosses
from fx_influence.autodiff.engine import Engine
from fx_influence.core.tree import Direction, dot
from fx_influence.estimators.consistency import agree_within, check_identity, tolerance_of
from fx_influence.estimators.deviations import left_out_parts, share_left
from fx_influence.optim.step import AdamWStep
from fx_influence.policy.precision import PassPrecision
from fx_influence.types import Gradients, Params


class RowInfluences(NamedTuple):
    """Influences of U's rows, all float64.

    Attributes:
        per_sequence: (n_u,), over the groups of E that the row does not leave out.
        per_token: (n_u, T) or None, likewise.
        over_all: (n_u,), over all groups: the terms of the identity.
        rounding: (n_u,), between two methods, NaN where there was one.
        method: how ``over_all`` was computed, for errors.
    """

    per_sequence: Tensor
    per_token: Tensor | None
    over_all: Tensor
    rounding: Tensor
    method: str


def sum_groups(
    update: LinearizedLosses,
    groups: GroupDerivatives,
    shares: Tensor,
    own_group: Tensor,
    per_token: bool,
    precision: PassPrecision,
) -> RowInfluences:
    """Add up the derivatives by group, less the one that each row leaves out; compute those of tokens if wanted.

    Args:
        update: U's losses to first order.
        groups: derivatives along the direction of each group.
        shares: (K,), the groups' shares of the objective's denominator.
        own_group: int64 (n_u,), the group to leave out of each row's influence, or -1.
        per_token: whether those of tokens are wanted.
        precision: of the passes over U.
    """
    left = share_left(shares, own_group)
    # With tokens still to come along u, derivatives along rounded directions are left to the error bars.
    awaits_tokens = per_token and not (update.resolves_tokens or precision.wants_two_methods)
    derivatives = update.jvp([groups.u]) if groups.narrowed and not awaits_tokens else groups.derivatives
    by_groups = derivatives.sum((0, 2))
    own_by_groups = left_out_parts(groups.derivatives.sum(-1), own_group)
    others_by_groups = (by_groups - own_by_groups) / left
    unknown = torch.full_like(by_groups, torch.nan)
    if update.resolves_tokens:
        over_all, left_out = derivatives.sum(0), left_out_parts(groups.derivatives, own_group)
        tokens = (over_all - left_out) / left.unsqueeze(-1)
        return RowInfluences(tokens.sum(-1), tokens if per_token else None, over_all.sum(-1), unknown, "the JVP over U")
    if not per_token:
        return RowInfluences(others_by_groups, None, by_groups, unknown, "ghost products over U")
    others = update.token_jvp(groups.u) if groups.tokens is None else groups.tokens
    if groups.own_tokens is None:
        by_tokens = others.sum(-1) + own_by_groups
    else:
        by_tokens, others = others.sum(-1), others - groups.own_tokens
    tokens = others / left.unsqueeze(-1)
    rounding = unknown if groups.narrowed and awaits_tokens else (by_tokens - by_groups).abs()
    if precision.under_autocast:
        # Ghost products hold the very gradient that the optimizer meets; the JVP is rounded another way.
        adding_up = _adding_up_to(others_by_groups, tokens)
        return RowInfluences(others_by_groups, adding_up, by_groups, rounding, "ghost products over U")
    return RowInfluences(tokens.sum(-1), tokens, by_tokens, rounding, "the JVP over U")


class Identity(NamedTuple):
    """The identity's sides, scalars: ``expected`` <u, g>, its ``residual``, and what is ``unattributed`` to a row."""

    expected: Tensor
    residual: Tensor
    unattributed: Tensor


def check_sums(
    params: Params,
    update: LinearizedLosses,
    grad: Gradients | None,
    groups: GroupDerivatives,
    rows: RowInfluences,
    engine: Engine,
    under_autocast: bool,
    bound: float,
) -> Identity:
    """Return <u, g> beside the rows' sum; raise ``IdentityError`` where they differ by more than rounding can make.

    Args:
        params: theta by name.
        update: U's losses to first order.
        grad: the trainer's gradient, which may hold more than the rows' losses, or None.
        groups: the derivatives, with <u, g>.
        rows: their sums.
        engine: engine of the policy as the trainer computes it.
        under_autocast: whether it computes in lower precision, so that ``grad`` differs from the rows' gradients.
        bound: of the residual over the size of the terms.
    """
    expected = torch.stack(list(groups.update_products.values())).sum()
    residual, unattributed = expected - rows.over_all.sum(), torch.zeros_like(expected)
    if grad is not None and (under_autocast or not agree_within(residual, rows.over_all, expected, bound)):
        # The trainer's gradient may hold terms that no coefficient expresses; the influences must still add up.
        unattributed = residual
        expected = (groups.u.scale * dot(engine.gradient(params, update.batch), groups.u.unit)).to(expected.device)
        residual = expected - rows.over_all.sum()
    # Influences of a clipped step cancel; the term that they cancel with has the size of what is rounded.
    clipping = groups.on_step.clipping.to(expected.device).reshape(1)
    check_identity(rows.method, residual, torch.cat([rows.over_all, clipping]), expected, bound)
    by_group = groups.derivatives.sum((0, 2))
    gap = rows.over_all.sum() - by_group.sum()
    if groups.narrowed:
        bound = max(bound, tolerance_of(torch.bfloat16))
    terms = torch.cat([by_group, clipping])
    check_identity("the groups of E", gap, terms, rows.over_all.sum(), bound, against="all of E at once")
    return Identity(expected, residual, unattributed)


SAMPLED_ROWS, SAMPLED_SHARE = 8, 1 / 8
"""Rows of which ``conditioning`` is estimated where it takes a JVP: so many or this share, whichever are more."""


def conditioning(update: LinearizedLosses, step: AdamWStep, groups: GroupDerivatives, over_all: Tensor) -> Tensor:
    """Return the share of sum |delta| along u on coordinates of fresh denominators; u's memory may be reused.

    Where they would take a JVP of their own, it is over evenly spaced rows of those that have a loss.
    """
    on_fresh = groups.on_fresh
    if on_fresh is None:
        u = groups.u
        step.keep_fresh_(u.unit)
        if not dot(u.unit, u.unit):
            return torch.zeros((), dtype=torch.float64, device=over_all.device)
        unit = Direction.of_(u.unit)
        fresh = unit._replace(scale=u.scale * unit.scale)
        if update.resolves_tokens:
            sample = evenly_spaced(update.rows)
            on_fresh, over_all = update.token_jvp_of(fresh, sample).sum(-1), over_all[sample]
        else:
            on_fresh = update.jvp([fresh])[0].sum(-1)
    size, rest = on_fresh.abs().sum(), (over_all - on_fresh).abs().sum()
    return torch.where(size > 0, size / (size + rest), 0.0)


def evenly_spaced(rows: Tensor) -> Tensor:
    """Return every k-th of the rows, with k the largest that leaves at least ``SAMPLED_ROWS`` and ``SAMPLED_SHARE``.

    Example:
        >>> evenly_spaced(torch.arange(20)).tolist()
        [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    """
    return rows[:: max(1, min(len(rows) // SAMPLED_ROWS, round(1 / SAMPLED_SHARE)))]


def _adding_up_to(per_sequence: Tensor, tokens: Tensor) -> Tensor:
    """Return the tokens' values with each row's gap to ``per_sequence`` distributed in proportion to their sizes."""
    size = tokens.abs()
    weight = size / size.sum(-1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
    return tokens + (per_sequence - tokens.sum(-1)).unsqueeze(-1) * weight
