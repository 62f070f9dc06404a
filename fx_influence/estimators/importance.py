"""Importance weights of rollouts that another policy sampled, self-normalised, and their effective sample size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.types import Estimator

MAX_LOG_WEIGHT = 10.0
"""Default bound on cumulative log-weights: beyond it one rollout would outweigh 20,000."""

MIN_ESS_SHARE = 0.25
"""Effective sample size, in rows of E, below which derivatives are refused: error bars then are at least twice those of
as many rollouts of the policy itself, and the bias of self-normalised weights, of order 1 / ess, is no longer small."""


class ImportanceWeights(NamedTuple):
    """Self-normalised weights pi_theta / pi_behaviour of E's rows, float64.

    Attributes:
        shares: w_at / sum_b w_bt, (n, R) by rank under "per_decision", or w_a / sum_b w_b, (n,) under "sequence".
        within: bool, the same shape: whether the log-weight is within the clipping bound; a clipped weight is constant.
    """

    shares: Tensor
    within: Tensor

    def mean(self, x: Tensor) -> Tensor:
        """Return the weighted estimate of E[sum_t x_t] from values x (n, R) by rank; scalar."""
        return (self.shares * (x.double().sum(-1) if self.shares.ndim == 1 else x)).sum()

    def ess(self) -> Tensor:
        """Return the effective sample size (sum w)^2 / sum w^2, the smallest over ranks; scalar."""
        return (1 / self.shares.square().sum(0)).min()


def cumulative_log_weights(log_ratios: Tensor, estimator: Estimator) -> Tensor:
    """Return the log-weights of a row's ranks: sums of log-ratios before each, (n, R); or of the row's, (n, 1).

    Args:
        log_ratios: (n, R), of each token by rank, 0 from a row's length on, so that a finished row keeps its weight.
        estimator: ``"per_decision"`` or ``"sequence"``.
    """
    if estimator == "sequence":
        return log_ratios.sum(-1, keepdim=True)
    return log_ratios.cumsum(-1) - log_ratios


def importance_weights(
    log_ratios: Tensor, estimator: Estimator, clip: float | None = MAX_LOG_WEIGHT
) -> ImportanceWeights:
    """Return the self-normalised weights of log-ratios log pi_theta - log pi_behaviour by token.

    Args:
        log_ratios: (n, R), by rank, 0 from a row's length on.
        estimator: ``"per_decision"`` or ``"sequence"``.
        clip: bound on |cumulative log-weight|; None does not clip.

    Source: Precup, Sutton & Singh 2000 (per-decision weights); Owen, Monte Carlo theory, ch. 9 (self-normalisation).

    Example:
        >>> ratios = torch.tensor([[0.0, 1.0], [0.0, 2.0]], dtype=torch.float64).log()
        >>> importance_weights(ratios.nan_to_num(neginf=0.0), "sequence").shares.tolist()
        [0.3333333333333333, 0.6666666666666666]
    """
    log_w = cumulative_log_weights(log_ratios, estimator)
    clipped = log_w if clip is None else log_w.clamp(-clip, clip)
    within = torch.ones_like(log_w, dtype=torch.bool) if clip is None else log_w.abs() <= clip
    shares = clipped.softmax(0)
    if estimator == "sequence":
        return ImportanceWeights(shares.squeeze(-1), within.squeeze(-1))
    return ImportanceWeights(shares, within)


def check_ess(weights: ImportanceWeights | None) -> None:
    """Raise ``ValueError`` where too few of E's rows carry the estimate; None, rows of the policy itself, pass."""
    if weights is None:
        return
    rows, ess = len(weights.shares), float(weights.ess())
    if not ess >= MIN_ESS_SHARE * rows:
        raise ValueError(
            f"the effective sample size of batch_e is {ess:.3g} of {rows} rows by its behaviour_logprobs; expected at "
            f"least {MIN_ESS_SHARE:g} of the rows, {MIN_ESS_SHARE * rows:.3g}, since the policy has moved too far from "
            "the one that sampled them. Pass rollouts of a newer policy, or check that behaviour_logprobs are at the "
            "temperature that sampled"
        )
