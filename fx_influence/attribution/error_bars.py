"""What each part of E contributes to the influences and to the step, and the error bars that follow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import einsum
from torch import Tensor

from fx_influence.attribution.cross_fitting import EvaluationGroups
from fx_influence.attribution.linearized_losses import LinearizedLosses, token_derivatives
from fx_influence.attribution.objective_gradients import Evaluation
from fx_influence.autodiff.engine import Engine
from fx_influence.core.tree import Direction
from fx_influence.estimators.deviations import NOTHING_LEFT_OUT, Deviations, leave_own_out, own_parts, share_left
from fx_influence.optim.step import AdamWStep
from fx_influence.types import Params


class PartsOfE(NamedTuple):
    """Contributions of E's groups or clusters, each a draw of its own.

    Attributes:
        influences: (C, n_u), to the influence of each rollout, the deviation of estimated denominators included.
        along_step: (C,), to the derivative along the whole step, likewise.
        shares: (C,), of the objective's denominator, adding up to 1.
        own: int64 (n_u,), the part that is left out of each influence, or -1.
    """

    influences: Tensor
    along_step: Tensor
    shares: Tensor
    own: Tensor

    def deviations(self) -> Deviations:
        """Return the deviation of each part from its expectation."""
        return Deviations.of(self.influences, self.shares, self.own)

    def total_stderr(self) -> Tensor:
        """Return the standard error of the derivative along the step, of which each influence is over its own parts."""
        rest = self.along_step - self.influences.sum(-1)
        deviations = self.deviations().by_part.sum(-1) + rest - self.shares * rest.sum()
        return Deviations(deviations.unsqueeze(-1), torch.full_like(self.own[:1], NOTHING_LEFT_OUT)).stderr()[0]


class LengthSlopes(NamedTuple):
    """Derivatives of log E[T]: ``rows`` (n_u,) along each rollout's part of the step, and ``along_step``, a scalar."""

    rows: Tensor
    along_step: Tensor


def length_slopes(evaluation: Evaluation, update: LinearizedLosses, step: AdamWStep) -> LengthSlopes:
    """Return the derivatives of log E[T], 0 where the denominator is known; the gradient's memory is reused."""
    if evaluation.length_gradient is None:
        zeros = evaluation.shares.new_zeros(update.shape[0])
        return LengthSlopes(zeros, zeros.sum())
    along_step = step.precondition_(evaluation.length_gradient).direction
    return LengthSlopes(update.jvp([Direction.of_(evaluation.length_gradient)])[0].sum(-1), along_step)


def parts_of_clusters(
    params: Params,
    pairwise: Tensor,
    slopes: LengthSlopes,
    evaluation: Evaluation,
    step: AdamWStep,
    engine: Engine,
    groups: EvaluationGroups,
) -> PartsOfE:
    """Return the contributions of E's clusters from the matrix.

    Args:
        params: theta by name.
        pairwise: (n_e, n_u), M.
        slopes: derivatives of log E[T].
        evaluation: the objective over E.
        step: the optimizer's step.
        engine: engine of the policy with all its derivatives.
        groups: of which the clusters are taken.
    """
    along_step = -token_derivatives(params, step.direction(), evaluation.batch, engine, None).sum(-1)
    rows = pairwise.double() - einsum(evaluation.excess, slopes.rows, "a, i -> a i")
    count, cluster = int(groups.cluster.max()) + 1, groups.cluster
    return PartsOfE(
        influences=rows.new_zeros(count, rows.shape[1]).index_add(0, cluster, rows),
        along_step=rows.new_zeros(count).index_add(0, cluster, along_step - evaluation.excess * slopes.along_step),
        shares=rows.new_zeros(count).index_add(0, cluster, evaluation.shares),
        own=torch.full_like(groups.own, NOTHING_LEFT_OUT),
    )


def leave_own_rows_out(
    pairwise: Tensor, slopes: LengthSlopes, evaluation: Evaluation, groups: EvaluationGroups
) -> Tensor:
    """Return the matrix of cross-fitted influences, whose columns add up to them: 0 for rows of i's own prompt."""
    if not groups.leave_out:
        return pairwise
    rows = pairwise - einsum(evaluation.excess, slopes.rows, "a, i -> a i").to(pairwise.dtype)
    is_own = groups.group.unsqueeze(1) == groups.own
    return torch.where(is_own, 0.0, rows / share_left(evaluation.group_shares, groups.own).to(pairwise.dtype))


def self_influence(parts: Tensor, evaluation: Evaluation, groups: EvaluationGroups) -> Tensor:
    """Return the influence of each rollout on its own prompt's entropy, float64 (n_u,), NaN where none is left out.

    The group that is left out, of influence O_i and share f, may hold other prompts, which move as all others do:

        self_i = (O_i - (f - f_p) delta_i) / f_p,   f_p the share of the row's own prompt

    Args:
        parts: (K, n_u), contributions of E's groups.
        evaluation: the objective over E.
        groups: which groups and clusters are the rows' own.
    """
    shares = evaluation.shares
    own_cluster, is_own = groups.own_cluster.clamp(min=0), groups.own_cluster != NOTHING_LEFT_OUT
    of_prompt = shares.new_zeros(int(groups.cluster.max()) + 1).index_add(0, groups.cluster, shares)[own_cluster]
    of_group = 1 - share_left(evaluation.group_shares, groups.own)
    others = leave_own_out(parts, evaluation.group_shares, groups.own)
    derivative = (own_parts(parts, groups.own) - (of_group - of_prompt) * others) / of_prompt
    # A prompt without completion tokens has no entropy per token.
    return torch.where(is_own & (of_prompt > 0), derivative, torch.nan)
