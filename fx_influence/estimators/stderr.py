"""Standard errors over the draw of E, with U fixed, and intervals: clusters are E's groups, whose rollouts depend."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from einops import einsum
from numpy.typing import ArrayLike
from scipy.special import stdtrit
from torch import Tensor

from fx_influence.types import Batch

Errors = TypeVar("Errors", float, np.ndarray, Tensor)

INTERVAL = 0.95
"""Probability with which an interval holds the truth, everywhere: a sign is told where it does not include 0."""

MAX_RANDOM_GROUPS = 8
"""Largest number of groups that replace the clusters where there is no matrix, each at the cost of a ghost product or a
JVP: cluster k is in group k % 8, the same whenever the batch is."""


def cluster_index(batch: Batch) -> Tensor:
    """Return the cluster of each row, int64 (n,) in 0..C-1: ``batch.group`` in sorted order, or the row itself."""
    if batch.group is None:
        return torch.arange(len(batch.input_ids), device=batch.input_ids.device)
    return torch.unique(batch.group, return_inverse=True)[1]


def cluster_stderr(parts: Tensor, total: Tensor, shares: Tensor, index: Tensor) -> Tensor:
    """Return the standard error of a ratio estimate: sqrt(C/(C-1) sum_c (sum_{a in c} (parts_a - total share_a))^2).

    Args:
        parts: (n, ...), contributions of the rows, with ``parts.sum(0) == total``.
        total: (...), the estimates.
        shares: (n,), each row's share of the denominator, adding up to 1.
        index: int64 (n,), the cluster of each row.

    Returns:
        Shape of ``total``, float64; NaN with fewer than two clusters.

    Source:
        Linearised ratio estimator: Cochran, Sampling Techniques, 3rd ed., section 6.

    Example:
        >>> parts, shares = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5])
        >>> cluster_stderr(parts, parts.sum(), shares, torch.arange(2)).item()
        2.0
    """
    count = int(index.max()) + 1
    if count < 2:
        return torch.full_like(total, torch.nan, dtype=torch.float64)
    deviations = parts.double() - einsum(shares.double(), total.double(), "row, ... -> row ...")
    sums = torch.zeros(count, *total.shape, dtype=torch.float64, device=parts.device).index_add(0, index, deviations)
    return (count / (count - 1) * sums.square().sum(0)).sqrt()


def interval_half_width(stderr: Errors, degrees_of_freedom: ArrayLike) -> Errors:
    """Return the half-width of a 95% interval by Student's t: the quantile t(0.975; degrees of freedom) times stderr.

    The sign of an estimate is told where the interval, estimate - half-width to estimate + half-width, does not
    include 0.

    Args:
        stderr: a number, array or tensor of standard errors.
        degrees_of_freedom: of all of them, or for an array of each: parts of E less one, as in
            ``Influence.degrees_of_freedom``; infinite for an error that is known.

    Returns:
        Of the kind of ``stderr``; NaN where it is, and with fewer than two parts.

    Source: Student 1908; Bakirov and Szekely 2005 for few independent groups of unlike variance.

    Example:
        >>> interval_half_width(torch.ones(2), 7), round(interval_half_width(1.0, 6), 4)
        (tensor([2.3646, 2.3646]), 2.4469)
    """
    quantile = stdtrit(degrees_of_freedom, (1 + INTERVAL) / 2)
    return stderr * (float(quantile) if np.ndim(quantile) == 0 else quantile)


def degrees_of_sum(stderr: np.ndarray, degrees_of_freedom: np.ndarray) -> float:
    """Return the degrees of freedom of the standard error of a sum of independent estimates, sqrt(sum_k s_k^2).

        nu = (sum_k s_k^2)^2 / sum_k s_k^4 / nu_k

    nu_k s_k^2 / sigma_k^2 is chi-squared with nu_k degrees, so that sum_k s_k^2 has the mean M = sum_k sigma_k^2 and
    the variance 2 sum_k sigma_k^4 / nu_k. M / nu times a chi-squared variable with nu degrees has the mean M and the
    variance 2 M^2 / nu. Equal variances give nu, in which s_k estimates sigma_k. It is between the smallest nu_k, where
    one estimate has all of the error, and their sum, where all s_k^2 / nu_k are equal; elsewhere the sum is too many.

    Args:
        stderr: (K,), standard errors of the estimates.
        degrees_of_freedom: (K,), of each.

    Returns:
        Infinite where all errors are 0; NaN where one is not known.

    Source: Satterthwaite 1946; Welch 1947.

    Example:
        >>> six = np.full(3, 6.0)
        >>> degrees_of_sum(np.ones(3), six), degrees_of_sum(np.array([1.0, 0.0, 0.0]), six)
        (18.0, 6.0)
    """
    squares = np.square(np.asarray(stderr, dtype=np.float64))
    if not squares.any():
        return np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        # An error of 0 says nothing of its degrees, which may be unknown.
        terms = np.where(squares == 0, 0.0, np.square(squares / squares.sum()) / degrees_of_freedom)
    return float(1 / terms.sum())
