"""Estimators of the policy's entropy over sampled rollouts, and their first-order surrogates as token coefficients."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from einops import repeat
from torch import Tensor

from fx_influence.core.batch_checks import check_fields, check_is_batch
from fx_influence.core.checks import check_choice, wrong_type
from fx_influence.estimators.importance import MAX_LOG_WEIGHT, ImportanceWeights, importance_weights
from fx_influence.estimators.score_term import baseline_values, prompt_of_rows
from fx_influence.types import Baseline, Batch, Estimator, Normalize, TokenValues


class CompletionValues(NamedTuple):
    """Token values of completions by rank, float64: column t holds the t-th completion token of each row.

    ``logprobs``, ``entropies``: (n, R) with R the longest completion, 0 from a row's length on. ``ok``: bool (n, R),
    whether the row has a token of that rank.
    """

    logprobs: Tensor
    entropies: Tensor
    ok: Tensor


class TokenCoefficients(NamedTuple):
    """Derivatives of a surrogate sum_a s_a with respect to log pi(y_at) and h_at.

    ``logprobs``, ``entropies``: (n, T), float64, 0 outside the completion mask.
    """

    logprobs: Tensor
    entropies: Tensor


def completion_values(values: TokenValues, completion_mask: Tensor) -> CompletionValues:
    """Index token values by rank: the t-th completion token of each row moves to column t.

    This closes the gaps of prompts, tool output and padding. The mask is read outside of vmap: only ``values`` may
    carry a batch dimension of directions.
    """
    order = _completion_order(completion_mask)
    ok = completion_mask.gather(-1, order)
    logprobs, entropies = (torch.where(ok, v.double().gather(-1, order), 0.0) for v in values)
    return CompletionValues(logprobs, entropies, ok)


def behaviour_log_ratios(base: CompletionValues, batch: Batch) -> Tensor | None:
    """Return log pi_theta - log pi_behaviour by rank, float64 (n, R), 0 from a row's length on; None on-policy.

    Args:
        base: (n, R), values at theta.
        batch: (n, T), E; without ``behaviour_logprobs`` theta itself sampled it.
    """
    if batch.behaviour_logprobs is None:
        return None
    behaviour = batch.behaviour_logprobs.double().gather(-1, _completion_order(batch.completion_mask))
    return torch.where(base.ok, base.logprobs - behaviour, 0.0)


def behaviour_weights(
    values: TokenValues, batch: Batch, estimator: Estimator, clip: float | None = MAX_LOG_WEIGHT
) -> ImportanceWeights | None:
    """Return the weights pi_theta / pi_behaviour of E's rows; None where theta itself sampled them.

    Args:
        values: (n, T), of E at theta.
        batch: (n, T), E.
        estimator: ``"per_decision"`` or ``"sequence"``.
        clip: bound on |cumulative log-weight|; None does not clip.
    """
    if batch.behaviour_logprobs is None:
        return None
    ratios = behaviour_log_ratios(completion_values(values, batch.completion_mask), batch)
    assert ratios is not None
    return importance_weights(ratios, estimator, clip)


def _completion_order(completion_mask: Tensor) -> Tensor:
    """Return the columns of each row's completion tokens in order, int64 (n, R), further ones from its length on."""
    longest = int(completion_mask.sum(-1).max())
    # A stable sort of "not a completion token" lists each row's completion positions first, in order.
    return (~completion_mask).to(torch.int8).argsort(dim=-1, stable=True)[:, :longest]


def check_estimator(estimator: str, normalize: str) -> None:
    """Raise ``ValueError`` for an unknown estimator or normalisation."""
    check_choice("estimator", estimator, get_args(Estimator))
    check_choice("normalize", normalize, get_args(Normalize))


def entropy_estimate(
    values: TokenValues, batch: Batch, normalize: Normalize = "token", estimator: Estimator = "per_decision"
) -> Tensor:
    """Return the entropy of the policy from rollouts of that same policy, or of another by importance weights.

    Args:
        values: log-probabilities and entropies (n, T) of the batch's tokens at the policy.
        batch: (n, T), with at least one completion token; sampled from the policy itself, or with
            ``behaviour_logprobs``.
        normalize: ``"token"``, E[sum_t h_t] / E[T] in nats per token; or ``"sequence"``, E[sum_t h_t] in nats per
            completion, where rows without completion tokens count.
        estimator: ``"per_decision"`` or ``"sequence"`` weights of rollouts with ``behaviour_logprobs``, self-normalised
            and clipped as in ``snis_delta``; the two are one without.

    Returns:
        float64 scalar.

    Raises:
        ValueError: for a batch without any completion token.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> values = TokenValues(-torch.ones(2, 2), torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        >>> entropy_estimate(values, Batch(mask.long(), mask, mask)).item()
        2.0
    """
    check_estimator(estimator, normalize)
    if not isinstance(values, TokenValues):
        raise wrong_type("values", values, "TokenValues", "Pass fx.token_values(params, batch, apply)")
    check_is_batch("batch", batch)
    if not batch.completion_mask.any():
        raise ValueError(
            f"batch.completion_mask of shape {tuple(batch.completion_mask.shape)} has no True at all; expected at "
            "least one completion token, since the entropy of none is undefined. Give rollouts with tokens"
        )
    check_fields("batch", batch)
    weights = behaviour_weights(values, batch, estimator)
    if weights is None:
        return values.entropies.double().sum() / denominator_weights(batch.completion_mask, normalize).sum()
    by_rank = completion_values(values, batch.completion_mask)
    return weights.mean(by_rank.entropies) / (weights.mean(by_rank.ok) if normalize == "token" else 1.0)


def denominator_weights(completion_mask: Tensor, normalize: Normalize) -> Tensor:
    """Return f_a, the weight of a rollout in the denominator: T_a per token, 1 per sequence; float64 (n,)."""
    lengths = completion_mask.sum(-1).double()
    return lengths if normalize == "token" else torch.ones_like(lengths)


def centred_entropies(
    values: CompletionValues,
    estimator: Estimator,
    normalize: Normalize,
    centre: CompletionValues,
    kind: Baseline = "batch",
    prompt: Tensor | None = None,
    weights: ImportanceWeights | None = None,
) -> Tensor:
    """Return x, the entropies minus what is expected of them, with the expectation taken from ``centre`` and frozen.

        sequence:      y_a  = h_a - H f_a,      x_a  = y_a - b_a       (n,)
        per_decision:  y_at = h_at - H ok_at,   x_at = y_at - b_at     (n, R), per token
                       y_at = h_at,             x_at = h_at - b_at     (n, R), per sequence

    Args:
        values: (n, R), the entropies to centre.
        estimator: which of the formulae.
        normalize: which of the formulae; per sequence y is h.
        centre: (n, R), the values that H and the baseline b are taken from, those at theta.
        kind: which baseline, see ``score_term.baseline_values``.
        prompt: int64 (n,), the prompt of each row, for the baselines that need it.
        weights: of the rows at ``centre``, in all means, where another policy sampled them.
    """
    h, h0, ok = values.entropies, centre.entropies, values.ok.double()
    if estimator == "sequence":
        h, h0, ok = h.sum(-1), h0.sum(-1), ok.sum(-1)
    if normalize == "sequence":
        return h - baseline_values(h0, kind, prompt, weights)
    mean = h0.sum() / ok.sum()
    if weights is not None:
        mean = weights.mean(centre.entropies) / weights.mean(centre.ok)
    return h - mean * ok - baseline_values(h0 - mean * ok, kind, prompt, weights)


def entropy_coefficients(
    values: TokenValues,
    batch: Batch,
    estimator: Estimator = "per_decision",
    normalize: Normalize = "token",
    baseline: Baseline = "batch",
    score: float = 1.0,
) -> TokenCoefficients:
    """Return the gradient of the entropy estimate as one pair of coefficients per token of E.

    With x frozen at theta, the surrogates whose gradients sum to grad H are

        sequence:      s_a = [h_a + S_a x_a] / sum_b f_b
        per_decision:  s_a = (1/Z) sum_t [h_at + S_a,<t x_at],   Z = sum_a T_a per token, n per sequence

    with S_a,<t the log-probability of the first t tokens, all of them from t = T_a on. Collected by token, the weight
    of log pi(y_at) is x_a / Z, or sum_{t' > t} x_at' / Z; that of h_at is 1 / Z.

    Args:
        values: (n, T), log-probabilities and entropies of E at theta.
        batch: (n, T), E.
        estimator: ``"per_decision"`` or ``"sequence"``.
        normalize: ``"token"`` or ``"sequence"``.
        baseline: which expectation x is centred by, see ``score_term.baseline_values``; "prompt" needs ``batch.group``.
        score: factor of the score term, that of S; any but 1 biases the gradient.

    Source:
        Score-function gradient with a frozen baseline (Williams 1992), per decision after Precup et al. 2000.
    """
    mask = batch.completion_mask
    by_rank = completion_values(values, mask)
    weights = behaviour_weights(values, batch, estimator)
    prompt = prompt_of_rows(batch, baseline)
    x = score * centred_entropies(by_rank, estimator, normalize, by_rank, baseline, prompt, weights)
    if weights is not None:
        return weighted_coefficients(x, weights, weights.shares, by_rank.ok, mask, normalize)
    z = denominator_weights(mask, normalize).sum()
    return TokenCoefficients(_score_weights(x, by_rank.ok, mask) / z, mask.double() / z)


def weighted_coefficients(
    x: Tensor,
    weights: ImportanceWeights,
    multiples: Tensor,
    ok: Tensor,
    completion_mask: Tensor,
    normalize: Normalize,
) -> TokenCoefficients:
    """Return the coefficients of sum_at m_at [h_at + S_a,<t x_at] / D, the log-weights' clipping included.

    Args:
        x: (n, R) by rank, or (n,) under "sequence".
        weights: of the rows, which D is of.
        multiples: m, shape of x; ``weights.shares`` for the estimate itself.
        ok: (n, R), whether the row has a token of that rank.
        completion_mask: (n, T).
        normalize: ``"token"`` or ``"sequence"``.
    """
    d = weights.mean(ok) if normalize == "token" else 1.0
    scores = _score_weights(torch.where(weights.within, multiples * x, 0.0), ok, completion_mask)
    m = multiples.unsqueeze(-1).expand(ok.shape) if multiples.ndim == 1 else multiples
    return TokenCoefficients(scores / d, _at_positions(m, completion_mask) / d)


def length_coefficients(
    completion_mask: Tensor,
    estimator: Estimator = "per_decision",
    weights: ImportanceWeights | None = None,
    score: float = 1.0,
) -> Tensor:
    """Return the gradient of log E[T], of the expected completion length, as a coefficient per token of E.

    The surrogates are those of the entropy with ok, 1 where a row has a token of that rank, in place of h:

        sequence:      s_a = S_a (T_a - mean T) / sum_b T_b
        per_decision:  s_a = sum_t S_a,<t (ok_at - mean ok_t) / sum_b T_b

    Args:
        completion_mask: (n, T), of E.
        estimator: ``"per_decision"`` or ``"sequence"``.
        weights: of the rows where another policy sampled them; means are then weighted, as in ``entropy_coefficients``.
        score: factor, that of the score term in ``entropy_coefficients``, whose H the derivative follows.

    Returns:
        The weights of log pi(y_at), float64 (n, T), 0 outside the mask.

    Example:
        >>> length_coefficients(torch.tensor([[True, True], [True, False]]), "sequence").tolist()
        [[0.16666666666666666, 0.16666666666666666], [-0.16666666666666666, 0.0]]
    """
    lengths = completion_mask.sum(-1)
    ok = ranks_in_use(completion_mask)
    f = lengths.double() if estimator == "sequence" else ok.double()
    if weights is not None:
        x = score * (f - (weights.shares * f).sum(0))
        return weighted_coefficients(x, weights, weights.shares, ok, completion_mask, "token").logprobs
    return _score_weights(score * (f - f.mean(0)), ok, completion_mask) / lengths.sum()


def excess_entropies(
    values: TokenValues,
    completion_mask: Tensor,
    estimator: Estimator = "per_decision",
    weights: ImportanceWeights | None = None,
) -> Tensor:
    """Return (h_a - H T_a) / sum_b T_b, how much each row raises the entropy per token; float64 (n,), adding up to 0.

    The entropy of all rows but those of a set p is H - x / (1 - share), with x the excess and share the share of sum T
    of the rows of p. Where another policy sampled the rows it is w_a (h_a - H T_a) / sum_b w_b T_b, or
    sum_t w_at x_at / (W_t E[T]) with the centred entropies x.

    Args:
        values: (n, T), of E at theta.
        completion_mask: (n, T), of E.
        estimator: ``"per_decision"`` or ``"sequence"`` weights.
        weights: of the rows where another policy sampled them.
    """
    if weights is not None:
        by_rank = completion_values(values, completion_mask)
        x = centred_entropies(by_rank, estimator, "token", by_rank, weights=weights)
        rows = weights.shares * x / weights.mean(by_rank.ok)
        return rows if rows.ndim == 1 else rows.sum(-1)
    lengths = denominator_weights(completion_mask, "token")
    h = torch.where(completion_mask, values.entropies.double(), 0.0).sum(-1)
    return (h - h.sum() / lengths.sum() * lengths) / lengths.sum()


def _score_weights(x: Tensor, ok: Tensor, completion_mask: Tensor) -> Tensor:
    """Return the weight of log pi(y_at) in sum_a S_a x_a or sum_at S_a,<t x_at, at the token's position, (n, T).

    Args:
        x: (n,) of rows, or (n, R) of ranks.
        ok: (n, R), whether the row has a token of that rank.
        completion_mask: (n, T).
    """
    by_row = x.ndim == 1
    weights = repeat(x, "row -> row rank", rank=ok.shape[1]) if by_row else x.flip(-1).cumsum(-1).flip(-1) - x
    return _at_positions(weights, completion_mask)


def ranks_in_use(completion_mask: Tensor) -> Tensor:
    """Return ok, whether each row has a token of each rank, bool (n, R)."""
    lengths = completion_mask.sum(-1)
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths.unsqueeze(-1)


def _at_positions(by_rank: Tensor, completion_mask: Tensor) -> Tensor:
    """Return values (n, R) by rank at their tokens' positions, (n, T), 0 outside the completion mask."""
    rank = (completion_mask.long().cumsum(-1) - 1).clamp(min=0)
    return torch.where(completion_mask, by_rank.gather(-1, rank), by_rank.new_zeros(()))
