"""The objective over E: its surrogates, and its gradient by groups of E's clusters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.attribution.cross_fitting import EvaluationGroups
from fx_influence.autodiff.engine import Engine
from fx_influence.batching.rows import rows_by_group
from fx_influence.core.dtensor import to_local
from fx_influence.core.tree import promote
from fx_influence.estimators.entropy import (
    TokenCoefficients,
    behaviour_weights,
    excess_entropies,
    length_coefficients,
)
from fx_influence.estimators.importance import ImportanceWeights, check_ess
from fx_influence.estimators.off_policy import coefficients_by_group
from fx_influence.objectives import Entropy, Objective, denominator_shares, score_share, surrogate_coefficients
from fx_influence.types import Batch, Gradients, Params, TokenValues


class Evaluation(NamedTuple):
    """The objective over E: its surrogates' coefficients, and its gradient by groups of E's clusters.

    Attributes:
        batch: E with coefficients.
        values: of E's tokens, (n_e, T) each.
        shares: (n_e,), each row's share of the objective's denominator, adding up to 1.
        excess: (n_e,), see ``excess_entropies``; 0 where the denominator is known.
        group_shares: (K,), the groups' shares of the denominator.
        group_excess: the groups' sums x_k of ``excess``, K of them, adding up to 0.
        ess: effective sample size, scalar; None where E was sampled from the policy itself.
        has_length_gradient: whether the first of ``gradients`` is L, that of log E[T], the objective's denominator, as
            where it is estimated and deviations are wanted.
        has_sum: whether the last of ``gradients`` is grad H, over all groups.
        gradients: each computed when it is iterated over. Those of the K groups add up to grad H. A group contributes
            grad H_k - x_k L to the deviation of grad H from its expectation, the H that its centre is estimated by
            included. Where weights are normalised at each rank, each is over all rows, see ``coefficients_by_group``.
    """

    batch: Batch
    values: TokenValues
    shares: Tensor
    excess: Tensor
    group_shares: Tensor
    group_excess: tuple[float, ...]
    ess: Tensor | None
    has_length_gradient: bool
    has_sum: bool
    gradients: Iterator[Params]

    def next_length_gradient(self) -> Params | None:
        """Return L, the first of ``gradients``; None where there is none."""
        return next(self.gradients) if self.has_length_gradient else None

    def deviating_gradients(self, length_gradient: Params | None) -> Iterator[Params]:
        """Return grad H_k - x_k L of each group from the ``gradients`` after L, or grad H_k where L is None."""
        # Not a generator expression, whose frame would hold one gradient while the next is made. The numbers come
        # first, since the iteration ends with the groups, before grad H is made.
        return map(partial(_deviating_, length_gradient), self.group_excess, self.gradients)


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
        memory_budget: bytes of the forward to cache for the reverse pass. Where a gradient is larger, the groups' are
            not to be added up in memory: grad H follows them, from one more pass over E.
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
            lengths = length_coefficients(
                batch_e.completion_mask, objective.estimator, importance, score_share(objective)
            )
            further.append(batch_e._replace(coefficients=lengths, entropy_coefficients=None))
        if by_group and isinstance(objective, Entropy):
            options = (objective.normalize, objective.baseline, groups.group, groups.num_groups, score_share(objective))
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
    excess_by_group = excess.new_zeros(groups.num_groups).index_add(0, groups.group, excess)
    has_sum = groups.num_groups > 1 and _bytes(params, dtype) > memory_budget

    def losses_of_all_rows() -> Iterator[Gradients]:
        every_row = [torch.arange(len(groups.group), device=groups.group.device)]
        _, once_more = engine.reweighted_gradients(params, batch_e, every_row, lambda _: weighted, 0, dtype)
        yield from once_more

    return Evaluation(
        batch=weighted[0],
        values=values,
        shares=shares,
        excess=excess,
        group_shares=shares.new_zeros(groups.num_groups).index_add(0, groups.group, shares),
        group_excess=tuple(excess_by_group.tolist()),
        ess=None if importance is None else importance.ess(),
        has_length_gradient=estimates_length,
        has_sum=has_sum,
        gradients=map(partial(_ascent_, params, dtype), chain(losses, losses_of_all_rows()) if has_sum else losses),
    )


def normalises_by_rank(objective: Entropy | Objective, batch_e: Batch) -> bool:
    """Return whether rows of E share the normalisation of their weights at each rank, so that none is a part alone."""
    weighted = batch_e.behaviour_logprobs is not None
    return weighted and isinstance(objective, Entropy) and objective.estimator == "per_decision"


def _bytes(params: Params, dtype: torch.dtype | None) -> int:
    """Return the bytes of a gradient on this process."""
    return sum(to_local(p).numel() * (dtype or promote(p.dtype)).itemsize for p in params.values())


def _importance(objective: Entropy | Objective, values: TokenValues, batch_e: Batch) -> ImportanceWeights | None:
    return behaviour_weights(values, batch_e, objective.estimator) if isinstance(objective, Entropy) else None


def _deviating_(length_gradient: Params | None, excess: float, ascent: Params) -> Params:
    """Return a group's gradient less its excess times the gradient of log E[T], in place."""
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
