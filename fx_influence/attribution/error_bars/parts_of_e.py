"""Contributions of each part of E to the influences and to the step, and the error bars that follow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import einsum
from torch import Tensor

from fx_influence.attribution.cross_fitting import EvaluationGroups
from fx_influence.attribution.error_bars.label_parts import LabelParts
from fx_influence.attribution.group_derivatives import GroupDerivatives, LengthSlopes
from fx_influence.attribution.linearized_losses import token_derivatives
from fx_influence.attribution.objective_gradients import Evaluation
from fx_influence.autodiff.engine import Engine
from fx_influence.estimators.deviations import (
    NOTHING_LEFT_OUT,
    Deviations,
    LabelDeviations,
    deviations_of,
    estimate_over_others,
    left_out_parts,
    share_left,
)
from fx_influence.labels import Labels
from fx_influence.optim.step import AdamWStep
from fx_influence.types import Params


class PartsOfE(NamedTuple):
    """Contributions of E's groups or clusters, drawn independently of one another.

    Attributes:
        influences: (C, n_u), to the influence of each rollout, the deviation of estimated denominators included.
        along_step: (C,), to the derivative along the whole step, likewise.
        shares: (C,), of the objective's denominator, adding up to 1.
        left_out: int64 (n_u,), the part that is left out of each influence, or -1.
    """

    influences: Tensor
    along_step: Tensor
    shares: Tensor
    left_out: Tensor

    def deviations(self) -> Deviations:
        """Return the deviation of each part from its expectation."""
        estimate = estimate_over_others(self.influences, self.shares, self.left_out)
        return Deviations(deviations_of(self.influences, estimate, self.shares, self.left_out), self.left_out)

    def total_deviations(self) -> Tensor:
        """Return the deviations (C,) of the derivative along the step, whose influences leave out different parts."""
        rest = self.along_step - self.influences.sum(-1)
        return self.deviations().by_part.sum(-1) + rest - self.shares * rest.sum()

    def total_stderr(self) -> Tensor:
        """Return the standard error of the derivative along the step."""
        deviations = self.total_deviations()
        return Deviations(deviations.unsqueeze(-1), torch.full_like(self.left_out[:1], NOTHING_LEFT_OUT)).stderr()[0]


def parts_of_clusters(
    params: Params,
    pairwise: Tensor,
    slopes: LengthSlopes | None,
    evaluation: Evaluation,
    step: AdamWStep,
    engine: Engine,
    groups: EvaluationGroups,
) -> PartsOfE:
    """Return the contributions of E's clusters from the matrix.

    Args:
        params: theta by name.
        pairwise: (n_e, n_u), M.
        slopes: derivatives of log E[T]; None where the denominator is known.
        evaluation: the objective over E.
        step: the optimizer's step.
        engine: engine of the policy with all its derivatives.
        groups: the groups of E, whose clusters are used.
    """
    along_step = -token_derivatives(params, step.direction(), evaluation.batch, engine, None).sum(-1)
    if slopes is not None:
        along_step = along_step - evaluation.excess * slopes.along_step
    rows = _deviating_rows(pairwise.double(), slopes, evaluation)
    count, cluster = int(groups.cluster.max()) + 1, groups.cluster
    return PartsOfE(
        influences=rows.new_zeros(count, rows.shape[1]).index_add(0, cluster, rows),
        along_step=rows.new_zeros(count).index_add(0, cluster, along_step),
        shares=rows.new_zeros(count).index_add(0, cluster, evaluation.shares),
        left_out=torch.full_like(groups.left_out, NOTHING_LEFT_OUT),
    )


def leave_own_rows_out(
    pairwise: Tensor, slopes: LengthSlopes | None, evaluation: Evaluation, groups: EvaluationGroups
) -> Tensor:
    """Return the matrix of cross-fitted influences, whose columns add up to them: 0 for rows of i's own prompt."""
    if not groups.leave_out:
        return pairwise
    rows = _deviating_rows(pairwise, slopes, evaluation)
    own_rows = groups.group.unsqueeze(1) == groups.left_out
    return torch.where(own_rows, 0.0, rows / share_left(evaluation.group_shares, groups.left_out).to(pairwise.dtype))


def _deviating_rows(pairwise: Tensor, slopes: LengthSlopes | None, evaluation: Evaluation) -> Tensor:
    """Return M_ai - x_a l_i, the rows' parts with that in the H which centres E."""
    if slopes is None:
        return pairwise
    return pairwise - einsum(evaluation.excess, slopes.tokens.sum(-1), "a, i -> a i").to(pairwise.dtype)


def self_influence(parts: Tensor, evaluation: Evaluation, groups: EvaluationGroups) -> Tensor | None:
    """Return the influence of each rollout on its own prompt's entropy, float64 (n_u,); None where none is left out.

    The group that is left out, of influence O_i and share f, may hold other prompts, which move as all others do:

        self_i = (O_i - (f - f_p) delta_i) / f_p,   f_p the share of the row's own prompt

    Args:
        parts: (K, n_u), contributions of E's groups.
        evaluation: the objective over E.
        groups: the groups and clusters of E, and those that each row of U leaves out.
    """
    if not groups.leave_out:
        return None
    shares = evaluation.shares
    own_cluster, in_e = groups.own_cluster.clamp(min=0), groups.own_cluster != NOTHING_LEFT_OUT
    of_prompt = shares.new_zeros(int(groups.cluster.max()) + 1).index_add(0, groups.cluster, shares)[own_cluster]
    of_group = 1 - share_left(evaluation.group_shares, groups.left_out)
    others = estimate_over_others(parts, evaluation.group_shares, groups.left_out)
    derivative = (left_out_parts(parts, groups.left_out) - (of_group - of_prompt) * others) / of_prompt
    # A prompt without completion tokens has no entropy per token.
    return torch.where(in_e & (of_prompt > 0), derivative, torch.nan)


def with_token_deviations(
    deviations: Deviations,
    tokens: Tensor,
    groups: GroupDerivatives,
    shares: Tensor,
    labels: Labels | None,
    parts: LabelParts,
) -> Deviations:
    """Return the deviations with those of tokens, or of the labels' sums, where the passes made what they need.

    Those of a label are the sums over its rows of those of the part of their losses that is its tokens'; those of a
    complement are the sums of its rows' deviations less those of the other labels.

    Args:
        deviations: of rollouts.
        tokens: (n_u, T), the influences of tokens.
        groups: derivatives by group, ``token_derivatives`` or ``parts`` among them.
        shares: (K,), the groups' shares of the denominator.
        labels: of tokens, or None.
        parts: of the losses, by label.
    """
    left_out = deviations.left_out
    if groups.token_derivatives is not None:
        return deviations._replace(tokens=deviations_of(groups.token_derivatives, tokens, shares, left_out))
    if labels is None or parts.by_token:
        return deviations
    by_label = deviations.by_part.new_zeros(len(deviations.by_part), len(labels.names) + 1)
    for derivatives, of_part, label in zip(groups.parts, parts.tokens, parts.labels, strict=True):
        estimate = torch.where(of_part, tokens, 0.0).sum(-1)
        by_label.index_add_(1, label + 1, deviations_of(derivatives, estimate, shares, left_out))
    by_label = by_label[:, 1:]
    for label, others, rows in parts.complements:
        by_label[:, label] = deviations.by_part[:, rows].sum(-1) - by_label[:, list(others)].sum(-1)
    return deviations._replace(by_label=LabelDeviations(labels.index, by_label))
