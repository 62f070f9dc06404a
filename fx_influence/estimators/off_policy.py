"""Parts of E in a weighted estimate: rows that another policy sampled share the normalisation of their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_influence.estimators.entropy import (
    TokenCoefficients,
    behaviour_weights,
    centred_entropies,
    completion_values,
    ranks_in_use,
    weighted_coefficients,
)
from fx_influence.estimators.importance import ImportanceWeights, cumulative_log_weights
from fx_influence.estimators.score_term import prompt_of_rows
from fx_influence.types import Baseline, Batch, Estimator, Normalize, TokenValues


def coefficients_by_group(
    values: TokenValues,
    batch: Batch,
    normalize: Normalize,
    baseline: Baseline,
    group: Tensor,
    num_groups: int,
    score: float = 1.0,
) -> list[TokenCoefficients]:
    """Return coefficients over all rows of what each group contributes to a weighted per-decision estimate's gradient.

    Per rank the estimate is a mean over rows whose weights are normalised by W_t, which a group has a part of too. With
    o_kt = sum_{a in k} w_at / W_t the group's share of the weights, and f_k its share of E[T], the group contributes

        sum_at (1[a in k] - o_kt + sum_t' o_kt' p_t') (w_at / W_t) [grad h_at + x_at grad S_a,<t] / D

    p_t = sum_a w_at ok_at / (W_t E[T]), beside the row's own surrogates: its deviation from its expectation is the
    contribution less f_k grad H. The contributions add up to grad H. With equal weights the last two terms cancel, and
    those of the rows' own surrogates remain.

    Args:
        values: (n, T), of E at theta.
        batch: (n, T), E with ``behaviour_logprobs``.
        normalize: ``"token"`` or ``"sequence"``.
        baseline: see ``entropy_coefficients``.
        group: int64 (n,), of each row.
        num_groups: number of groups K.
        score: factor of the score term.

    Source: delta method for a sum of ratios; Owen, Monte Carlo theory, ch. 9.
    """
    by_rank = completion_values(values, batch.completion_mask)
    weights = behaviour_weights(values, batch, "per_decision")
    assert weights is not None
    prompt = prompt_of_rows(batch, baseline)
    x = score * centred_entropies(by_rank, "per_decision", normalize, by_rank, baseline, prompt, weights)
    of_ranks = (weights.shares * by_rank.ok).sum(0)
    results = []
    for k in range(num_groups):
        member = (group == k).unsqueeze(-1).double()
        share = (member * weights.shares).sum(0)
        multiples = (member - share + (share * of_ranks).sum() / of_ranks.sum()) * weights.shares
        results.append(weighted_coefficients(x, weights, multiples, by_rank.ok, batch.completion_mask, normalize))
    return results


def weighted_denominator_shares(
    weights: ImportanceWeights, completion_mask: Tensor, estimator: Estimator, normalize: Normalize
) -> Tensor:
    """Return each row's share of the weighted denominator, float64 (n,), adding up to 1.

        sequence:      w_a f_a / sum_b w_b f_b
        per_decision:  sum_t o_at ok_at / E[T] per token, sum_t o_at p_t per sequence, see ``coefficients_by_group``

    Args:
        weights: of the rows.
        completion_mask: (n, T).
        estimator: ``"per_decision"`` or ``"sequence"``.
        normalize: ``"token"`` or ``"sequence"``.
    """
    ok = ranks_in_use(completion_mask).double()
    if estimator == "sequence":
        f = weights.shares * (ok.sum(-1) if normalize == "token" else 1.0)
        return f / f.sum()
    counted = weights.shares * ok
    of_ranks = counted.sum(0) / counted.sum()
    return counted.sum(-1) / counted.sum() if normalize == "token" else (weights.shares * of_ranks).sum(-1)


def spread_by_rank(
    values: TokenValues,
    tangents: TokenValues,
    batch: Batch,
    normalize: Normalize,
    baseline: Baseline,
    score: float = 1.0,
) -> Tensor:
    """Return the last two terms of ``coefficients_by_group`` for each row along one direction, float64 (n,).

    With d_t the derivative of the estimate's term of rank t, they are sum_t (sum_t' o_at' p_t' - o_at) d_t, and add up
    to 0 over rows.

    Args:
        values: (n, T), of E at theta.
        tangents: (n, T), their derivatives along the direction.
        batch: (n, T), E with ``behaviour_logprobs``.
        normalize: ``"token"`` or ``"sequence"``.
        baseline: see ``entropy_coefficients``.
        score: factor of the score term.
    """
    by_rank, moving = (completion_values(x, batch.completion_mask) for x in (values, tangents))
    weights = behaviour_weights(values, batch, "per_decision")
    assert weights is not None
    prompt = prompt_of_rows(batch, baseline)
    x = score * centred_entropies(by_rank, "per_decision", normalize, by_rank, baseline, prompt, weights)
    scores = torch.where(weights.within, cumulative_log_weights(moving.logprobs, "per_decision"), 0.0)
    of_ranks = (weights.shares * by_rank.ok).sum(0)
    by_rank_derivative = (weights.shares * (moving.entropies + scores * x)).sum(0)
    if normalize == "token":
        by_rank_derivative = by_rank_derivative / of_ranks.sum()
    own_shares = (weights.shares * of_ranks).sum(-1) / of_ranks.sum()
    return own_shares * by_rank_derivative.sum() - (weights.shares * by_rank_derivative).sum(-1)
