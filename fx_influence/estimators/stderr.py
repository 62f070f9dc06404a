"""Standard errors over the draw of E, U given: clusters are E's groups, since rollouts of one prompt move together."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_influence.types import Batch

MAX_RANDOM_GROUPS = 8
"""Unions of clusters that stand in for the clusters where the matrix is not at hand; each costs a product or a JVP."""


def cluster_index(batch: Batch) -> Tensor:
    """The cluster of each row, 0 to C-1 int64 (n,): ``batch.group`` in sorted order, or the row itself without one."""
    if batch.group is None:
        return torch.arange(len(batch.input_ids), device=batch.input_ids.device)
    return torch.unique(batch.group, return_inverse=True)[1]


def random_group_index(batch: Batch) -> Tensor:
    """Clusters dealt in turn to min(8, C) unions, so that the same batch always gives the same ones; int64 (n,)."""
    return cluster_index(batch) % MAX_RANDOM_GROUPS


def cluster_stderr(parts: Tensor, total: Tensor, shares: Tensor, index: Tensor) -> Tensor:
    """Standard error of a ratio estimate: sqrt(C/(C-1) sum_c (sum_{a in c} (parts_a - total share_a))^2).

    ``parts``: (n, ...) with ``parts.sum(0) == total``. ``shares``: (n,), each row's share of the denominator, adding up
    to 1. ``index``: (n,), the cluster of each row. Returns the shape of ``total``, float64; NaN with fewer than two
    clusters. Source: linearised ratio estimator, Cochran, Sampling Techniques, 3rd ed., section 6.

    Example:
        >>> parts, shares = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5])
        >>> cluster_stderr(parts, parts.sum(), shares, torch.arange(2)).item()
        2.0
    """
    count = int(index.max()) + 1
    if count < 2:
        return torch.full_like(total, torch.nan, dtype=torch.float64)
    off = parts.double() - total.double() * shares.double().reshape(-1, *[1] * total.dim())
    sums = torch.zeros(count, *total.shape, dtype=torch.float64, device=parts.device).index_add(0, index, off)
    return (count / (count - 1) * sums.square().sum(0)).sqrt()
