"""Cross-fitting: an E that U is part of, and the part of E that is left out of each rollout's influence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.batching.prompts import prompt_index
from fx_influence.estimators.deviations import NOTHING_LEFT_OUT
from fx_influence.estimators.stderr import MAX_RANDOM_GROUPS, cluster_index
from fx_influence.types import Batch

MIN_PROMPTS = 4
"""Prompts below which nothing is cross-fitted: the others of three are two, whose error bars have one degree of
freedom."""


class EvaluationRows(NamedTuple):
    """The rollouts that the objective is estimated on, and which of them share their prompt with a row of U.

    Attributes:
        batch: E, n_e rows, without coefficients.
        own_cluster: int64 (n_u,), the cluster of E, see ``cluster_index``, that holds the row's own prompt; -1 where
            E holds fresh rollouts.
    """

    batch: Batch
    own_cluster: Tensor


class EvaluationGroups(NamedTuple):
    """The groups of E's rows by which the objective is differentiated, and the one that each row of U leaves out.

    Attributes:
        cluster: int64 (n_e,), the cluster of each row of E.
        group: int64 (n_e,), the group of each row of E, a union of clusters, 0 to ``num_groups`` - 1.
        num_groups: number of groups.
        own_cluster: int64 (n_u,), the cluster that is the row's own prompt, or -1.
        own: int64 (n_u,), the group that holds it, or -1.
        leave_out: whether any row leaves a group out.
    """

    cluster: Tensor
    group: Tensor
    num_groups: int
    own_cluster: Tensor
    own: Tensor
    leave_out: bool


def split_into_groups(rows: EvaluationRows, stderr: bool, matrix: bool) -> EvaluationGroups:
    """Return E's groups: one, or min(8, C) of its C clusters for error bars and folds, or with a matrix every fold.

    Args:
        rows: E, and the clusters to leave out.
        stderr: whether error bars are wanted.
        matrix: whether the matrix is wanted, which gives the error bars, and folds of one prompt each.
    """
    cluster, own_cluster = cluster_index(rows.batch), rows.own_cluster
    leave_out = bool((own_cluster != NOTHING_LEFT_OUT).any())
    if matrix and leave_out:
        group, own = cluster, own_cluster
    elif (stderr and not matrix) or leave_out:
        group = cluster % MAX_RANDOM_GROUPS
        own = torch.where(own_cluster == NOTHING_LEFT_OUT, own_cluster, own_cluster % MAX_RANDOM_GROUPS)
    else:
        group, own = torch.zeros_like(cluster), own_cluster
    return EvaluationGroups(cluster, group, int(group.max()) + 1, own_cluster, own, leave_out)


def evaluation_rows(batch_u: Batch, batch_e: Batch | None) -> EvaluationRows:
    """Return E, which is U itself where ``batch_e`` is None, and the clusters to leave out.

    Rows are left out where ``batch_e`` holds all rollouts of U under U's groups, as the generation batch of several
    optimizer steps does. Fresh rollouts of the same prompts are no reason.

    Args:
        batch_u: update batch, n_u rows.
        batch_e: evaluation batch, or None.

    Raises:
        ValueError: where U is part of E and there are fewer than four prompts.
    """
    if batch_e is None:
        group = prompt_index(batch_u) if batch_u.group is None else batch_u.group
        batch_e = batch_u._replace(coefficients=None, entropy_coefficients=None, group=group)
        own = cluster_index(batch_e)
    elif _holds_rows_of(batch_e, batch_u):
        own = torch.searchsorted(torch.unique(_groups(batch_e)), _groups(batch_u))
    else:
        return EvaluationRows(batch_e, torch.full_like(batch_u.input_ids[:, 0], NOTHING_LEFT_OUT))
    prompts = int(cluster_index(batch_e).max()) + 1 if len(batch_e.input_ids) else 0
    if prompts < MIN_PROMPTS:
        raise ValueError(
            f"batch_e has rollouts of {prompts} prompts, those of batch_u among them; expected at least {MIN_PROMPTS}, "
            "since each rollout's influence is taken over the other prompts. Use more prompts in a step, or pass "
            "fresh rollouts as batch_e"
        )
    return EvaluationRows(batch_e, own)


def _holds_rows_of(batch_e: Batch, batch_u: Batch) -> bool:
    """Return whether every rollout of U is one of E, with the same group and tokens."""
    if batch_u.group is None or batch_e.group is None:
        return False
    known = torch.isin(_groups(batch_u), _groups(batch_e))
    return bool(known.all()) and _rollouts(batch_u) <= _rollouts(batch_e)


def _groups(batch: Batch) -> Tensor:
    assert batch.group is not None
    return batch.group.long()


def _rollouts(batch: Batch) -> set[tuple[int, tuple[int, ...], tuple[bool, ...]]]:
    """Return each row's group, its tokens and which of them count, without padding."""
    rows = zip(_groups(batch).tolist(), batch.input_ids, batch.attention_mask, batch.completion_mask, strict=True)
    return {
        (group, tuple(ids[attended].tolist()), tuple(counts[attended].tolist()))
        for group, ids, attended, counts in rows
    }
