"""Standard errors over the draw of E, with U fixed: clusters are E's groups, as rollouts of a prompt are dependent."""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor

from fx_influence.types import Batch

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
