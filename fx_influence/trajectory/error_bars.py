"""The result over a window, with error bars, from what each group of E contributes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fx_influence.attribution.error_bars.parts_of_e import PartsOfE
from fx_influence.estimators.deviations import (
    NOTHING_LEFT_OUT,
    Deviations,
    deviations_of,
    left_out_parts,
    share_left,
)
from fx_influence.trajectory.recursion import StepParts, WindowParts
from fx_influence.trajectory.result import InfluenceOverSteps


def add_up_groups(
    parts: WindowParts, shares: Tensor, left_out: Tensor, per_token: bool, stderr: bool, ess: Tensor | None
) -> InfluenceOverSteps:
    """Return the influences over the groups of E that each row may have, and their standard errors.

    Args:
        parts: contributions of E's groups.
        shares: (C,), the groups' shares of the objective's denominator.
        left_out: int64 (n,), of all rollouts of the window in order, the group that is left out, or -1.
        per_token: whether influences of tokens are returned.
        stderr: whether error bars are wanted; they are NaN with fewer than two groups.
        ess: effective sample size of E.
    """
    sizes = [step.tokens.shape[1] for step in parts.steps]
    tokens = tuple(
        (step.tokens.sum(0) - left_out_parts(step.tokens, own_group)) / share_left(shares, own_group).unsqueeze(-1)
        for step, own_group in zip(parts.steps, left_out.split(sizes), strict=True)
    )
    per_sequence = tuple(x.sum(-1) for x in tokens)
    all_groups = _sum_of_groups(parts)
    decay = torch.cat([step.weight_decay for step in all_groups.steps])
    momentum, second_moment = all_groups.momentum.squeeze(), all_groups.second_moment.squeeze()
    if not stderr:
        # One group has no standard errors.
        parts, shares, left_out = all_groups, torch.ones_like(shares[:1]), torch.full_like(left_out, NOTHING_LEFT_OUT)
    of_rollouts = _parts_of_rollouts(parts, shares, left_out)
    deviations = of_rollouts.deviations()
    of_moments = _stderr_of(torch.stack([parts.momentum, parts.second_moment], -1), shares)
    error_bars = {
        "stderr": deviations.stderr().split(sizes),
        "momentum_stderr": of_moments[0],
        "second_moment_stderr": of_moments[1],
        "weight_decay_stderr": _stderr_of(torch.stack([step.weight_decay for step in parts.steps], -1), shares),
        "total_stderr": of_rollouts.total_stderr(),
    }
    if per_token:
        by_part = torch.cat([_padded(step.tokens, tokens) for step in parts.steps], 1)
        padded = torch.cat([_padded(x, tokens) for x in tokens])
        deviations = deviations._replace(tokens=deviations_of(by_part, padded, shares, left_out))
    return InfluenceOverSteps(
        per_sequence=per_sequence,
        per_token=tokens if per_token else None,
        momentum=momentum,
        second_moment=second_moment,
        weight_decay=decay,
        eps=torch.cat([step.eps for step in all_groups.steps]).sum(),
        total=torch.cat(per_sequence).sum() + momentum + second_moment + decay.sum(),
        residual=torch.cat([step.residual for step in all_groups.steps]),
        ess=ess,
        deviations=deviations if len(shares) > 1 else None,
        **error_bars,
    )


def _sum_of_groups(parts: WindowParts) -> WindowParts:
    """Return the contributions of all of E as those of one group."""
    steps = [StepParts(*(x.sum(0, keepdim=True) for x in step)) for step in parts.steps]
    return WindowParts(steps, parts.momentum.sum(0, keepdim=True), parts.second_moment.sum(0, keepdim=True))


def _parts_of_rollouts(parts: WindowParts, shares: Tensor, left_out: Tensor) -> PartsOfE:
    """Return what each group contributes to every rollout of the window, and along everything that ``total`` has."""
    influences = torch.cat([step.tokens.sum(-1) for step in parts.steps], 1)
    decay = torch.stack([step.weight_decay for step in parts.steps]).sum(0)
    return PartsOfE(influences, influences.sum(1) + parts.momentum + parts.second_moment + decay, shares, left_out)


def _stderr_of(parts: Tensor, shares: Tensor) -> Tensor:
    """Return the standard errors (m,) of sums over groups of ``parts`` (C, m), nothing left out."""
    left_out = torch.full(parts.shape[1:], NOTHING_LEFT_OUT, device=parts.device)
    return Deviations(deviations_of(parts, parts.sum(0), shares, left_out), left_out).stderr()


def _padded(values: Tensor, tokens: tuple[Tensor, ...]) -> Tensor:
    """Return values (..., T) with zeros up to the longest row of the window, whose ``tokens`` (n_u, T) are given."""
    longest = max(x.shape[-1] for x in tokens)
    return F.pad(values, (0, longest - values.shape[-1]))
