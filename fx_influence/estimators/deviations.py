"""Deviations of influences from their expectations by part of E: leaving parts out, and the errors of any sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOTHING_LEFT_OUT = -1
"""Value of ``left_out`` for a rollout whose influence is taken over all parts of E."""


class Deviations(NamedTuple):
    """Deviation of each influence from its expectation, over the draw of E, by the part of E that it comes from.

    The parts, which are E's clusters or groups of them, are drawn independently of one another, so that the squares of
    any sum of a part's deviations add up to the variance of that sum of influences.

    Attributes:
        by_part: (C, n), nats per unit lr, float64, adding up to 0 over the parts; 0 for the part that is left out of
            an influence.
        left_out: int64 (n,), the part that is left out of each influence, or -1.
        tokens: (C, n, T), those of the influences of tokens, where these are known by part; or None.
        by_label: those of the sums of tokens' influences over some labels, where these are known; or None.
    """

    by_part: Tensor
    left_out: Tensor
    tokens: Tensor | None = None
    by_label: LabelDeviations | None = None

    def stderr(self) -> Tensor:
        """Return the standard error of each influence, float64 (n,); NaN with fewer than two parts."""
        return _root_of_squares(self.by_part, self._counted())

    def degrees_of_freedom(self) -> int:
        """Return C - 1 for the C parts behind an influence, the fewest of all: one less where a part is left out."""
        return int(self._counted().min()) - 1 if len(self.left_out) else len(self.by_part) - 1

    def stderr_of_sums(self, index: Tensor, num_labels: int) -> Tensor:
        """Return the standard errors of sums of influences, float64 (L,): the root of the parts' summed squares.

        The deviations of a part are added up before they are squared, as influences over one E err together.

        Args:
            index: int64 (n,) of rollouts or (n, T) of tokens, the label of each, -1 for none.
            num_labels: number of labels L.

        Returns:
            NaN for labels of tokens whose deviations are not known, and with fewer than two parts.
        """
        by_part = self._sums_by_part(index, num_labels)
        if by_part is None:
            return torch.full((num_labels,), torch.nan, dtype=torch.float64, device=index.device)
        return _root_of_squares(by_part, self._used(index, num_labels))

    def covariance_of_sums(self, index: Tensor, num_labels: int) -> Tensor | None:
        """Return the covariances of the errors of sums of influences, float64 (L, L); None where they are not known.

            covariance_lm = sum_k d_kl d_km sqrt(C_l / (C_l - 1) C_m / (C_m - 1))

        Its diagonal has the squares of ``stderr_of_sums``; NaN for labels with fewer than two parts.

        Args:
            index: int64 (n,) of rollouts or (n, T) of tokens, the label of each, -1 for none.
            num_labels: number of labels L.
        """
        by_part = self._sums_by_part(index, num_labels)
        if by_part is None:
            return None
        c = self._used(index, num_labels).double()
        scaled = by_part * torch.where(c < 2, torch.nan, c / (c - 1)).sqrt()
        return scaled.T @ scaled

    def _sums_by_part(self, index: Tensor, num_labels: int) -> Tensor | None:
        """Return the deviations of the sums over labels by part, (C, L); None where they are not known."""
        if index.ndim == 1:
            return _sums_by_label(self.by_part, index, num_labels)
        if self.tokens is not None:
            return _sums_by_label(self.tokens.flatten(1), index.flatten(), num_labels)
        if self.by_label is not None and torch.equal(self.by_label.labels, index):
            return self.by_label.by_part
        return None

    def _used(self, index: Tensor, num_labels: int) -> Tensor:
        """Return the number of parts behind the sum over each label, int64 (L,)."""
        labels = torch.arange(num_labels, device=index.device)
        in_label = (index.flatten(1 if index.ndim == 2 else 0).reshape(len(index), -1, 1) == labels).any(1)
        counted = ~is_left_out(len(self.by_part), self.left_out)
        return (in_label.T.unsqueeze(0) & counted.unsqueeze(1)).any(-1).sum(0)

    def _counted(self) -> Tensor:
        """Return the number of parts that each influence is over, int64 (n,)."""
        return len(self.by_part) - (self.left_out != NOTHING_LEFT_OUT).long()


class LabelDeviations(NamedTuple):
    """Deviations ``by_part`` (C, L) of the sums of tokens' influences over L ``labels``, int64 (n, T)."""

    labels: Tensor
    by_part: Tensor


def deviations_of(parts: Tensor, estimate: Tensor, shares: Tensor, left_out: Tensor) -> Tensor:
    """Return (parts_k - share_k estimate) / (1 - share_p), 0 for k = p = left_out_i: (C, n, ...), float64.

    Args:
        parts: (C, n, ...), what each part of E contributes to each influence.
        estimate: (n, ...), the influences, each over the parts that it does not leave out.
        shares: (C,), the parts' shares of the objective's denominator, adding up to 1.
        left_out: int64 (n,), the part that is left out, or -1.
    """
    further = [1] * (parts.ndim - 2)
    expected = shares.double().reshape(-1, 1, *further) * estimate
    deviations = (parts.double() - expected) / share_left(shares, left_out).reshape(-1, *further)
    return torch.where(is_left_out(len(parts), left_out).reshape(len(parts), -1, *further), 0.0, deviations)


def estimate_over_others(parts: Tensor, shares: Tensor, left_out: Tensor) -> Tensor:
    """Return sum_{k != p} parts_ki / (1 - share_p), p = left_out_i: each influence over the parts that it may have.

    Args:
        parts: (C, n), what each part of E contributes to each influence.
        shares: (C,), the parts' shares of the objective's denominator, adding up to 1.
        left_out: int64 (n,), the part to leave out, or -1 for none.

    Returns:
        float64 (n,).

    Source: cross-fitting, Chernozhukov et al. 2018.

    Example:
        >>> parts, shares = torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([0.5, 0.5])
        >>> estimate_over_others(parts, shares, torch.tensor([0, -1])).tolist()
        [6.0, 4.0]
    """
    return torch.where(is_left_out(len(parts), left_out), 0.0, parts.double()).sum(0) / share_left(shares, left_out)


def left_out_parts(parts: Tensor, left_out: Tensor) -> Tensor:
    """Return parts[left_out_i, i], the part that is left out of each influence; float64 (n, ...), 0 where none is."""
    chosen = is_left_out(len(parts), left_out).reshape(len(parts), -1, *[1] * (parts.ndim - 2))
    return torch.where(chosen, parts.double(), 0.0).sum(0)


def is_left_out(count: int, left_out: Tensor) -> Tensor:
    """Return whether part k of ``count`` is the one left out of influence i, (C, n)."""
    return torch.arange(count, device=left_out.device).unsqueeze(1) == left_out


def share_left(shares: Tensor, left_out: Tensor) -> Tensor:
    """Return 1 - share_left_out_i, the denominator's share of the parts that each influence is over; float64 (n,)."""
    return torch.where(left_out == NOTHING_LEFT_OUT, 1.0, 1 - shares.double()[left_out.clamp(min=0)])


def _sums_by_label(values: Tensor, index: Tensor, num_labels: int) -> Tensor:
    """Return the sums (C, L) of values (C, m) by label (m,); label -1 is in none."""
    sums = values.new_zeros(len(values), num_labels + 1).index_add(1, index + 1, values)
    return sums[:, 1:]


def _root_of_squares(deviations: Tensor, count: Tensor) -> Tensor:
    """Return sqrt(C / (C - 1) sum_k deviations_k^2) with C = ``count`` by column; NaN with fewer than two."""
    c = count.double()
    return torch.where(c < 2, torch.nan, (c / (c - 1) * deviations.square().sum(0)).sqrt())
