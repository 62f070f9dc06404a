"""Gradients of the losses of U's tokens by label, from which sums over labels get their error bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.autodiff.engine import Engine
from fx_influence.core.tree import dot
from fx_influence.labels import Labels
from fx_influence.types import Batch, Gradients, Params, TokenValues


class LabelledLosses(NamedTuple):
    """Gradients of the losses of U's tokens by label, to meet the direction of each group of E.

    Attributes:
        gradients: of the sum of each label's losses, rows divided by the share of E that they are over; none without
            labels of tokens, or where ``by_token``.
        by_token: whether each group's direction is put through a JVP of all tokens instead, as pays with more labels
            than groups.
    """

    gradients: Sequence[Gradients]
    by_token: bool

    def products(self, direction: Params) -> Tensor:
        """Return the inner products of a direction with the labels' gradients, float64 (L,)."""
        return torch.stack([dot(gradient, direction) for gradient in self.gradients])


def labelled_losses(
    params: Params,
    batch_u: Batch,
    labels: Labels | None,
    share_left: Tensor,
    num_groups: int,
    engine: Engine,
    memory_budget: int,
    dtype: torch.dtype | None,
) -> LabelledLosses:
    """Return the cheaper way to the labels' sums by group: a gradient a label, or a JVP a group.

    Args:
        params: theta by name.
        batch_u: update batch, n_u rows with coefficients.
        labels: of its tokens, (n_u, T), or None.
        share_left: (n_u,), the denominator's share of the groups that each row's influence is over.
        num_groups: number of groups K.
        engine: engine of the policy as the trainer computes it.
        memory_budget: bytes of the forward to keep for the labels' reverse passes.
        dtype: of the gradients; None takes at least float32.
    """
    if labels is None:
        return LabelledLosses((), by_token=False)
    if len(labels.names) > num_groups:
        return LabelledLosses((), by_token=True)

    def weighted(label: int) -> Batch:
        weight = (labels.index == label) / share_left.unsqueeze(-1)
        c, b = (
            None if w is None else torch.where(batch_u.completion_mask, w.double(), 0.0) * weight
            for w in (batch_u.coefficients, batch_u.entropy_coefficients)
        )
        return batch_u._replace(coefficients=c, entropy_coefficients=b)

    def weightings(_: TokenValues) -> Sequence[Batch]:
        return [weighted(label) for label in range(len(labels.names))]

    all_rows = [torch.arange(len(batch_u.input_ids), device=batch_u.input_ids.device)]
    _, gradients = engine.reweighted_gradients(params, batch_u, all_rows, weightings, memory_budget, dtype)
    *others, first = gradients
    return LabelledLosses((first, *others), by_token=False)
