"""Gradients of the losses of U's tokens by label, from which sums over labels get their error bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.autodiff.engine import Engine
from fx_influence.core.tree import dot
from fx_influence.labels import UNLABELLED, Labels, as_labels
from fx_influence.types import Batch, Gradients, Params, TokenValues


class Complement(NamedTuple):
    """A label that all completion tokens of some rows have but for those of some other labels.

    Attributes:
        label: its place among the names.
        others: places of the other labels of these rows.
        rows: bool (n_u,), the rows.
    """

    label: int
    others: tuple[int, ...]
    rows: Tensor


class LabelledLosses(NamedTuple):
    """Gradients of the losses of U's tokens by label, to meet the direction of each group of E.

    Attributes:
        labels: places of the labels that are differentiated.
        gradients: of the sum of each of their losses, rows divided by the share of E that they are over; none without
            labels of tokens, or where ``by_token``.
        complements: labels whose sums are those of rollouts less those of ``labels``.
        by_token: whether each group's direction is put through a JVP of all tokens instead, as pays with more labels
            than groups.
    """

    labels: tuple[int, ...]
    gradients: Sequence[Gradients]
    complements: tuple[Complement, ...]
    by_token: bool

    def products(self, direction: Params) -> Tensor:
        """Return the inner products of a direction with the labels' gradients, float64."""
        return torch.stack([dot(gradient, direction) for gradient in self.gradients])


def token_labels(
    batch_u: Batch, labels: Tensor | Labels | None, engine: Engine, *, stderr: bool, per_token: bool, matrix: bool
) -> Labels | None:
    """Return the labels of the tokens of all processes, or None.

    Args:
        batch_u: update batch of this process.
        labels: of its tokens, (n_u, T), or None.
        engine: knows the other processes.
        stderr: whether standard errors are wanted.
        per_token: whether influences of tokens are wanted.
        matrix: whether the matrix is.

    Raises:
        TypeError: for labels of another kind.
        ValueError: for labels of another shape, and where nothing comes of them.
    """
    if labels is None:
        return None
    chosen = as_labels(labels)
    if chosen.index.shape != batch_u.input_ids.shape:
        raise ValueError(
            f"labels has shape {tuple(chosen.index.shape)}; expected {tuple(batch_u.input_ids.shape)}, one for each "
            "token of batch_u. Labels of rollouts need not be given here: pass them to the result's sums"
        )
    if not (stderr and per_token) or matrix:
        raise ValueError(
            f"labels are given with stderr={stderr}, per_token={per_token} and matrix={matrix}; expected True, True "
            "and False, since they are for standard errors of sums of tokens. Leave them out"
        )
    return replace(chosen, index=engine.full_tokens(batch_u, chosen.index))


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

    A label that no token has needs no gradient, nor does one of each set of labels that share rows: sums over rollouts
    are known, so it is what the others leave of them.

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
        return LabelledLosses((), (), (), by_token=False)
    complements = complements_of(labels, batch_u.completion_mask)
    derived = {x.label for x in complements}
    used = torch.stack([(labels.index == k).any() for k in range(len(labels.names))]).tolist()
    chosen = tuple(k for k in range(len(labels.names)) if k not in derived and used[k])
    if len(chosen) > num_groups:
        return LabelledLosses((), (), (), by_token=True)
    if not chosen:
        return LabelledLosses((), (), complements, by_token=False)

    def weighted(label: int) -> Batch:
        weight = (labels.index == label) / share_left.unsqueeze(-1)
        c, b = (
            None if w is None else torch.where(batch_u.completion_mask, w.double(), 0.0) * weight
            for w in (batch_u.coefficients, batch_u.entropy_coefficients)
        )
        return batch_u._replace(coefficients=c, entropy_coefficients=b)

    def weightings(_: TokenValues) -> Sequence[Batch]:
        return [weighted(label) for label in chosen]

    all_rows = [torch.arange(len(batch_u.input_ids), device=batch_u.input_ids.device)]
    _, gradients = engine.reweighted_gradients(params, batch_u, all_rows, weightings, memory_budget, dtype)
    *others, first = gradients
    return LabelledLosses(chosen, (first, *others), complements, by_token=False)


def complements_of(labels: Labels, completion_mask: Tensor) -> tuple[Complement, ...]:
    """Return the last label of each set of labels that share rows, where they have all completion tokens of these rows.

    Args:
        labels: of tokens, (n_u, T).
        completion_mask: bool (n_u, T).

    Example:
        >>> index, mask = torch.tensor([[-1, 0, 1], [-1, 2, 2]]), torch.tensor([[False, True, True]] * 2)
        >>> [(x.label, x.others) for x in complements_of(Labels(index, ("a", "b", "c")), mask)]
        [(1, (0,)), (2, ())]
    """
    count = len(labels.names)
    # Completion tokens without a label are one more, which is never differentiated.
    index = torch.where(labels.index == UNLABELLED, count, labels.index)
    in_row = torch.stack([((index == k) & completion_mask).any(-1) for k in range(count + 1)]).cpu()
    result = []
    remaining = {k for k in range(count + 1) if bool(in_row[k].any())}
    while remaining:
        members, rows = {min(remaining)}, in_row[min(remaining)]
        while len(joined := {k for k in remaining if bool((in_row[k] & rows).any())}) > len(members):
            members, rows = joined, in_row[sorted(joined)].any(0)
        remaining -= members
        if count not in members:
            *others, label = sorted(members)
            result.append(Complement(label, tuple(others), rows.to(labels.index.device)))
    return tuple(result)
