"""The change of entropy over a step from token values before and after it, and how sure measured - predicted is."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.attribution.display import ILL_CONDITIONED
from fx_influence.attribution.result import Influence
from fx_influence.estimators.deviations import is_left_out, share_left
from fx_influence.estimators.entropy import (
    CompletionValues,
    behaviour_log_ratios,
    behaviour_weights,
    completion_values,
    excess_entropies,
)
from fx_influence.estimators.importance import MAX_LOG_WEIGHT, importance_weights
from fx_influence.estimators.snis import SnisDelta, snis
from fx_influence.estimators.stderr import cluster_index
from fx_influence.interop.live.change.over_others import PartsOfRows
from fx_influence.objectives import Entropy
from fx_influence.types import Batch, Estimator, TokenValues


class MeasuredChange(NamedTuple):
    """The change of entropy over a step, by importance sampling on E.

    Attributes:
        measured_change: on all rows of E at the policy after the step.
        change_over_others: where E is U, with each row at the step that the optimizer would have made without its fold,
            see ``over_others``; else None.
        unexplained_stderr: standard error of the measured change less the predicted one, in nats; NaN where it is not
            known.
        measured_degrees_of_freedom: of Student's t for intervals of the measured change: E's clusters less one.
    """

    measured_change: SnisDelta
    change_over_others: SnisDelta | None
    unexplained_stderr: float
    measured_degrees_of_freedom: int


def measure_change(
    batch_e: Batch,
    before: TokenValues,
    after: TokenValues,
    shifts: TokenValues | None,
    parts: PartsOfRows,
    influence: Influence,
    objective: Entropy,
    lr: float,
) -> MeasuredChange:
    """Return the change of entropy over a step.

    Args:
        batch_e: E, (n_e, T).
        before: (n_e, T), token values before the step.
        after: (n_e, T), after it.
        shifts: (n_e, T), of those after it by leaving each row's fold out of the step; None with an E that is not U.
        parts: of E.
        influence: of the step, per unit lr.
        objective: how the entropy is estimated.
        lr: lr_ref of the step.
    """
    base, moved = (completion_values(values, batch_e.completion_mask) for values in (before, after))
    options = objective.estimator, objective.normalize, MAX_LOG_WEIGHT
    clusters, behaviour = cluster_index(batch_e), behaviour_log_ratios(base, batch_e)
    change = used = snis(base, moved, *options, clusters, behaviour)
    over_others = None
    if shifts is not None:
        shifted = TokenValues(*(x + shift for x, shift in zip(after, shifts, strict=True)))
        moved = completion_values(shifted, batch_e.completion_mask)
        over_others = used = snis(base, moved, *options, clusters, behaviour)
    rows = used.contributions
    if objective.normalize == "token":
        weights = behaviour_weights(before, batch_e, objective.estimator)
        excess = excess_entropies(before, batch_e.completion_mask, objective.estimator, weights)
        rows = rows - excess * _log_length_change(base, moved, objective.estimator, behaviour)
    by_part = torch.zeros_like(parts.shares).index_add(0, parts.part, rows)
    deviations = by_part - parts.shares * used.delta_h
    error = difference_stderr(deviations, influence, parts.shares, lr)
    return MeasuredChange(change, over_others, error, int(clusters.max()))


def _log_length_change(
    base: CompletionValues, moved: CompletionValues, estimator: Estimator, behaviour: Tensor | None
) -> Tensor:
    """Return the change of log E[T], the logarithm of the entropy's denominator, scalar."""
    at_theta = torch.zeros_like(base.logprobs) if behaviour is None else behaviour
    ratios = at_theta + moved.logprobs - base.logprobs
    before, after = (importance_weights(x, estimator).mean(base.ok).log() for x in (at_theta, ratios))
    return after - before


def difference_stderr(measured: Tensor, influence: Influence, shares: Tensor, lr: float) -> float:
    """Return the standard error of the measured change less the predicted one, in nats; NaN without error bars.

    The deviations of both are subtracted part by part before they are squared. Where E is U, a part's measured change
    is along the step without it. To first order it differs from that along the step by d_k = sum_{i not in k} delta_i /
    (1 - f_i) - sum_i delta_i, and lr f_k d_k is no error of E's.

    Args:
        measured: (C,), deviations of the measured change by part of E, in nats.
        influence: of the step, per unit lr, with deviations by the same parts.
        shares: (C,), of the parts, of the objective's denominator.
        lr: lr_ref of the step.
    """
    deviations, predicted = influence.deviations, influence.total_deviations
    if deviations is None or predicted is None or len(predicted) != len(measured) or len(measured) < 2:
        return math.nan
    left_out, delta = deviations.left_out, influence.per_sequence
    over_others = (delta / share_left(shares, left_out)).unsqueeze(0)
    without = torch.where(is_left_out(len(shares), left_out), 0.0, over_others).sum(1)
    # Where the denominator is that of this very gradient, d_k says nothing about the step without k.
    responds = bool(influence.conditioning > ILL_CONDITIONED)
    expected = torch.zeros_like(shares) if responds else shares * (without - delta.sum())
    count, difference = len(measured), measured - lr * (predicted + expected)
    return float((count / (count - 1) * difference.square().sum()).sqrt())
