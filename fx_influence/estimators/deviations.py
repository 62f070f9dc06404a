"""Deviations of influences from their expectations by part of E: leaving parts out, and the errors of any sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import einsum
from torch import Tensor

NOTHING_LEFT_OUT = -1
"""Value of ``own`` for a rollout whose influence is taken over all parts of E."""


class Deviations(NamedTuple):
    """How far each part of E carries each influence from its expectation, over the draw of E.

    The parts, which are E's clusters or groups of them, are drawn independently of one another, so that the squares of
    any sum of a part's deviations add up to the variance of that sum of influences.

    Attributes:
        by_part: (C, n), nats per unit lr, float64, adding up to 0 over the parts; 0 for the part that is left out of
            an influence.
        own: int64 (n,), the part that is left out of each influence, or -1.
    """

    by_part: Tensor
    own: Tensor

    @classmethod
    def of(cls, parts: Tensor, shares: Tensor, own: Tensor) -> Deviations:
        """Return the deviations of the influences that ``leave_own_out`` makes of the same arguments."""
        estimate = leave_own_out(parts, shares, own)
        deviations = (parts.double() - einsum(shares, estimate, "part, row -> part row")) / share_left(shares, own)
        return cls(torch.where(_is_own(parts, own), 0.0, deviations), own)

    def stderr(self) -> Tensor:
        """Return the standard error of each influence, float64 (n,); NaN with fewer than two parts."""
        return _root_of_squares(self.by_part, len(self.by_part) - (self.own != NOTHING_LEFT_OUT).long())

    def stderr_of_sums(self, membership: Tensor) -> Tensor:
        """Return the standard errors of sums of influences, float64 (L,): the root of the parts' summed squares.

        The deviations of a part are added up before they are squared, as influences over one E err together.

        Args:
            membership: bool (L, n), the influences in each sum.
        """
        sums = einsum(self.by_part, membership.double(), "part row, label row -> part label")
        counted = ~_is_own(self.by_part, self.own)
        used = (membership.unsqueeze(0) & counted.unsqueeze(1)).any(-1).sum(0)
        return _root_of_squares(sums, used)


def leave_own_out(parts: Tensor, shares: Tensor, own: Tensor) -> Tensor:
    """Return sum_{k != own_i} parts_ki / (1 - share_own_i), each influence over the parts of E that are not its own.

    Args:
        parts: (C, n), what each part of E contributes to each influence.
        shares: (C,), the parts' shares of the objective's denominator, adding up to 1.
        own: int64 (n,), the part to leave out, or -1 for none.

    Returns:
        float64 (n,).

    Source: cross-fitting, Chernozhukov et al. 2018.

    Example:
        >>> parts, shares = torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([0.5, 0.5])
        >>> leave_own_out(parts, shares, torch.tensor([0, -1])).tolist()
        [6.0, 4.0]
    """
    return torch.where(_is_own(parts, own), 0.0, parts.double()).sum(0) / share_left(shares, own)


def own_parts(parts: Tensor, own: Tensor) -> Tensor:
    """Return parts[own_i, i], the part that is left out of each influence; float64 (n, ...), 0 where none is."""
    is_own = _is_own(parts, own).reshape(*parts.shape[:2], *[1] * (parts.ndim - 2))
    return torch.where(is_own, parts.double(), 0.0).sum(0)


def _is_own(parts: Tensor, own: Tensor) -> Tensor:
    """Return whether part k is the one left out of influence i, (C, n)."""
    return torch.arange(len(parts), device=own.device).unsqueeze(1) == own


def share_left(shares: Tensor, own: Tensor) -> Tensor:
    """Return 1 - share_own_i, the denominator's share of the parts that each influence is over; float64 (n,)."""
    return torch.where(own == NOTHING_LEFT_OUT, 1.0, 1 - shares.double()[own.clamp(min=0)])


def _root_of_squares(deviations: Tensor, count: Tensor) -> Tensor:
    """Return sqrt(C / (C - 1) sum_k deviations_k^2) with C = ``count`` by column; NaN with fewer than two."""
    c = count.double()
    return torch.where(c < 2, torch.nan, (c / (c - 1) * deviations.square().sum(0)).sqrt())
