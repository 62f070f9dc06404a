"""Parts of the losses of U's rollouts by label of tokens, from which sums over labels get their error bars."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.autodiff.engine import Engine
from fx_influence.labels import UNLABELLED, Labels, as_labels
from fx_influence.types import Batch


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


class LabelParts(NamedTuple):
    """Parts of the rollouts' losses, the terms of some tokens each, from which sums over labels get their error bars.

    Labels that share no row are in one part, so that each row's derivative of it is that of one label's tokens.

    Attributes:
        tokens: bool (P, n_u, T), those of each part.
        labels: int64 (P, n_u), the label that each row has in it, -1 for none.
        complements: labels whose sums are those of rollouts less those of other labels.
        by_token: whether each group's direction is put through a JVP of all tokens instead, as pays with more parts
            than groups; there are no parts then.
    """

    tokens: Tensor
    labels: Tensor
    complements: tuple[Complement, ...]
    by_token: bool

    def losses(self, batch_u: Batch) -> list[Batch]:
        """Return the batch with the coefficients of each part alone."""

        def of_part(tokens: Tensor) -> Batch:
            c, b = (
                None if w is None else torch.where(tokens, w, 0.0)
                for w in (batch_u.coefficients, batch_u.entropy_coefficients)
            )
            return batch_u._replace(coefficients=c, entropy_coefficients=b)

        return [of_part(tokens) for tokens in self.tokens]


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


def label_parts(labels: Labels | None, completion_mask: Tensor, num_groups: int) -> LabelParts:
    """Return the parts of the losses that the labels' sums are made of.

    A label that no token has needs none, nor does one of each set of labels that share rows: sums over rollouts are
    known, so it is what the others leave of them.

    Args:
        labels: of tokens, (n_u, T), or None.
        completion_mask: bool (n_u, T).
        num_groups: number of groups K of E.

    Example:
        >>> index, mask = torch.tensor([[-1, 0, 1], [-1, 2, 3]]), torch.tensor([[False, True, True]] * 2)
        >>> label_parts(Labels(index, ("a", "b", "c", "d")), mask, 8).labels.tolist()
        [[0, 2]]
    """
    none = completion_mask.new_zeros(0, *completion_mask.shape)
    no_labels = none.new_zeros(none.shape[:2], dtype=torch.int64)
    if labels is None:
        return LabelParts(none, no_labels, (), by_token=False)
    in_row = _rows_by_label(labels, completion_mask)
    complements = _complements(in_row, len(labels.names), completion_mask.device)
    derived = {x.label for x in complements}
    used = in_row[:-1].any(1).tolist()
    members: list[list[int]] = []
    for label in (k for k, has_tokens in enumerate(used) if has_tokens and k not in derived):
        alone = (part for part in members if not bool((in_row[part].any(0) & in_row[label]).any()))
        part = next(alone, None)
        if part is None:
            members.append([label])
        else:
            part.append(label)
    if len(members) > num_groups:
        return LabelParts(none, no_labels, (), by_token=True)
    if not members:
        return LabelParts(none, no_labels, complements, by_token=False)
    tokens = torch.stack([torch.stack([labels.index == k for k in part]).any(0) for part in members]) & completion_mask
    by_row = torch.where(tokens, labels.index, UNLABELLED).amax(-1)
    return LabelParts(tokens, by_row, complements, by_token=False)


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
    return _complements(_rows_by_label(labels, completion_mask), len(labels.names), completion_mask.device)


def _rows_by_label(labels: Labels, completion_mask: Tensor) -> Tensor:
    """Return which rows have completion tokens of each label, last of none: bool (L + 1, n_u), on the CPU."""
    count = len(labels.names)
    index = torch.where(labels.index == UNLABELLED, count, labels.index)
    return torch.stack([((index == k) & completion_mask).any(-1) for k in range(count + 1)]).cpu()


def _complements(in_row: Tensor, count: int, device: torch.device) -> tuple[Complement, ...]:
    """Return ``complements_of`` labels from their rows, of which completion tokens without a label are one more."""
    result = []
    remaining = {k for k in range(count + 1) if bool(in_row[k].any())}
    while remaining:
        members, rows = {min(remaining)}, in_row[min(remaining)]
        while len(joined := {k for k in remaining if bool((in_row[k] & rows).any())}) > len(members):
            members, rows = joined, in_row[sorted(joined)].any(0)
        remaining -= members
        if count not in members:
            *others, label = sorted(members)
            result.append(Complement(label, tuple(others), rows.to(device)))
    return tuple(result)
