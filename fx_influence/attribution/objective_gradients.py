"""The objective over E: its surrogates, and its gradient by groups of E's clusters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.attribution.cross_fitting import EvaluationGroups
from fx_influence.autodiff.engine import Engine
from fx_influence.autodiff.ghost import plan_directions
from fx_influence.batching.rows import rows_by_group
from fx_influence.core.tree import promote
from fx_influence.estimators.entropy import (
    TokenCoefficients,
    behaviour_weights,
    excess_entropies,
    length_coefficients,
)
from fx_influence.estimators.importance import ImportanceWeights, check_ess
from fx_influence.estimators.off_policy import coefficients_by_group
from fx_influence.objectives import Entropy, Objective, denominator_shares, surrogate_coefficients
from fx_influence.types import Batch, Gradients, Params, TokenValues


class Evaluation(NamedTuple):
    """The objective over E: its surrogates' coefficients, and its gradient by groups of E's clusters.

    Attributes:
        batch: E with coefficients.
        shares: (n_e,), each row's share of the objective's denominator, adding up to 1.
        excess: (n_e,), see ``excess_entropies``; 0 where the denominator is known.
        group_shares: (K,), the groups' shares of the denominator.
        length_gradient: gradient of log E[T], the objective's denominator, by name; None where it is known or no
            deviations are wanted.
        ess: effective sample size, scalar; None where E was sampled from the policy itself.
        gradients: one for each group, computed when iterated over; they add up to grad H. With ``length_gradient`` L
            that of group k is sum_a grad s_a - x_k L, x_k the group's excess: what the group contributes to the
            deviation of grad H from its expectation, the H that its centre is estimated by included. Where weights are
            normalised at each rank, it is over all rows, see ``coefficients_by_group``.
    """

    batch: Batch
    shares: Tensor
    excess: Tensor
    group_shares: Tensor
    length_gradient: Params | None
    ess: Tensor | None
    gradients: Iterable[Params]


def evaluate_objective(
    params: Params,
    batch_e: Batch,
    objective: Entropy | Objective,
    groups: EvaluationGroups,
    with_deviations: bool,
    engine: Engine,
    memory_budget: int,
    dtype: torch.dtype | None,
) -> Evaluation:
    """Return the objective's coefficients over E and its gradient by groups of rows.

    Args:
        params: theta by name.
        batch_e: evaluation batch, n_e rows.
        objective: whose gradient is wanted.
        groups: of E's rows.
        with_deviations: whether the deviation of each row's or group's part from its expectation is wanted.
        engine: engine of the policy with all its derivatives.
        memory_budget: bytes of the forward to cache for the reverse pass.
        dtype: of the gradients; None takes at least float32.

    Raises:
        ValueError: where E is of another policy and its effective sample size is too small.
    """
    estimates_length = with_deviations and isinstance(objective, Entropy) and objective.normalize == "token"
    by_group = with_deviations and groups.num_groups > 1 and normalises_by_rank(objective, batch_e)
    scored: list[tuple[TokenValues, ImportanceWeights | None]] = []
    weighted: list[Batch] = []

    def batch_of(weights: TokenCoefficients) -> Batch:
        return batch_e._replace(coefficients=weights.logprobs, entropy_coefficients=weights.entropies)

    def with_coefficients(values: TokenValues) -> Sequence[Batch]:
        importance = _importance(objective, values, batch_e)
        check_ess(importance)
        scored.append((values, importance))
        weighted.append(batch_of(surrogate_coefficients(objective, values, batch_e)))
        further: list[Batch] = []
        if estimates_length and isinstance(objective, Entropy):
            lengths = length_coefficients(batch_e.completion_mask, objective.estimator, importance)
            further.append(batch_e._replace(coefficients=lengths, entropy_coefficients=None))
        if by_group and isinstance(objective, Entropy):
            options = (objective.normalize, objective.baseline, groups.group, groups.num_groups)
            *others, last = map(batch_of, coefficients_by_group(values, batch_e, *options))
            return [last, *further, *others]
        return [weighted[0], *further]

    # The contribution of a group to a weighted estimate takes all rows, and is that of the only "group" of the passes.
    rows = rows_by_group(groups.group, groups.num_groups)
    if by_group:
        rows = [torch.arange(len(groups.group), device=groups.group.device)]
    _, losses = engine.reweighted_gradients(params, batch_e, rows, with_coefficients, memory_budget, dtype)
    values, importance = scored[0]
    shares = denominator_shares(objective, batch_e.completion_mask, importance)
    excess = torch.zeros_like(shares)
    if estimates_length and isinstance(objective, Entropy):
        excess = excess_entropies(values, batch_e.completion_mask, objective.estimator, importance)
    length_gradient = _ascent_(params, dtype, next(losses)) if estimates_length else None
    if length_gradient is not None:
        length_gradient = _as_narrow_as_directions(length_gradient, groups.num_groups, memory_budget)
    excess_by_group = excess.new_zeros(groups.num_groups).index_add(0, groups.group, excess).tolist()
    return Evaluation(
        batch=weighted[0],
        shares=shares,
        excess=excess,
        group_shares=shares.new_zeros(groups.num_groups).index_add(0, groups.group, shares),
        length_gradient=length_gradient,
        ess=None if importance is None else importance.ess(),
        # Not a generator expression, whose frame would hold one gradient while the next is made.
        gradients=map(partial(_deviating_ascent_, params, dtype, length_gradient), losses, excess_by_group),
    )


def normalises_by_rank(objective: Entropy | Objective, batch_e: Batch) -> bool:
    """Return whether rows of E share the normalisation of their weights at each rank, so that none is a part alone."""
    weighted = batch_e.behaviour_logprobs is not None
    return weighted and isinstance(objective, Entropy) and objective.estimator == "per_decision"


def _as_narrow_as_directions(length_gradient: Params, num_groups: int, memory_budget: int) -> Params:
    """Return the gradient of log E[T] in bfloat16 where the directions of all groups do not fit the budget.

    It is in memory beside each of them. Its multiples add up to 0 over the groups, so its rounding is in no influence
    over all of E; it is in error bars and in what cross-fitting leaves out, as independent errors of 2**-9 of its
    entries. Float64 is left as it is where directions are, one at a time.
    """
    plan = plan_directions(length_gradient, num_groups, memory_budget)
    if plan.dtype is None and plan.at_once == num_groups:
        return length_gradient
    return {
        name: x if plan.dtype is None and x.dtype == torch.float64 else x.to(torch.bfloat16)
        for name, x in length_gradient.items()
    }


def _importance(objective: Entropy | Objective, values: TokenValues, batch_e: Batch) -> ImportanceWeights | None:
    return behaviour_weights(values, batch_e, objective.estimator) if isinstance(objective, Entropy) else None


def _deviating_ascent_(
    params: Params, dtype: torch.dtype | None, length_gradient: Params | None, gradient: Gradients, excess: float
) -> Params:
    """Return ``_ascent_`` of a group, less the group's excess times the gradient of log E[T]."""
    ascent = _ascent_(params, dtype, gradient)
    if length_gradient is not None and excess != 0:
        for name, x in ascent.items():
            x.sub_(length_gradient[name], alpha=excess)
    return ascent


def _ascent_(params: Params, dtype: torch.dtype | None, gradient: Gradients) -> Params:
    """Return the gradient of an objective from that of its loss, which is minus the objective; None counts as 0.

    The tensors given are reused.
    """
    return {
        name: torch.zeros_like(p, dtype=dtype or promote(p.dtype)) if (g := gradient[name]) is None else g.neg_()
        for name, p in params.items()
    }
