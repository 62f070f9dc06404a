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
"""Smallest number of prompts for cross-fitting; with three, the other two give error bars of one degree of freedom."""


class EvaluationRows(NamedTuple):
    """The rollouts that the objective is estimated on, and which of them share their prompt with a row of U.

    Attributes:
        batch: E, n_e rows, without coefficients.
        own_cluster: int64 (n_u,), the cluster of E, see ``cluster_index``, that holds the row's own prompt; -1 where
            E holds fresh rollouts.
        leave_out: whether any row of U has one.
    """

    batch: Batch
    own_cluster: Tensor
    leave_out: bool


class EvaluationGroups(NamedTuple):
    """The groups of E's rows by which the objective is differentiated, and the one that each row of U leaves out.

    Attributes:
        cluster: int64 (n_e,), the cluster of each row of E.
        group: int64 (n_e,), the group of each row of E, a union of clusters, 0 to ``num_groups`` - 1.
        num_groups: number of groups.
        own_cluster: int64 (n_u,), the cluster that is the row's own prompt, or -1.
        left_out: int64 (n_u,), the group that holds it, or -1.
        leave_out: whether any row leaves a group out.
    """

    cluster: Tensor
    group: Tensor
    num_groups: int
    own_cluster: Tensor
    left_out: Tensor
    leave_out: bool


def split_into_groups(
    rows: EvaluationRows, stderr: bool, matrix: bool, normalised_by_rank: bool = False
) -> EvaluationGroups:
    """Return E's groups: one, or min(8, C) of its C clusters for error bars and folds, or with a matrix every fold.

    Args:
        rows: E, and the clusters to leave out.
        stderr: whether error bars are wanted.
        matrix: whether the matrix is wanted, which gives the error bars, and folds of one prompt each.
        normalised_by_rank: whether rows share the normalisation of their weights at each rank, so that the matrix gives
            no error bars and no row can be left out of it.

    Raises:
        ValueError: for a matrix with rows to leave out that it cannot leave out.
    """
    cluster, own_cluster, leave_out = cluster_index(rows.batch), rows.own_cluster, rows.leave_out
    if matrix and leave_out and normalised_by_rank:
        raise ValueError(
            "matrix is True with behaviour_logprobs, rollouts of U in E and the estimator 'per_decision'; expected "
            "False, since the weights of a prompt that is left out have a part in every other row's. Leave the matrix "
            "out, or take objective=fx.Entropy('sequence')"
        )
    if matrix and leave_out:
        group, left_out = cluster, own_cluster
    elif (stderr and (not matrix or normalised_by_rank)) or leave_out:
        group = cluster % MAX_RANDOM_GROUPS
        left_out = torch.where(own_cluster == NOTHING_LEFT_OUT, own_cluster, own_cluster % MAX_RANDOM_GROUPS)
    else:
        group, left_out = torch.zeros_like(cluster), own_cluster
    return EvaluationGroups(cluster, group, int(group.max()) + 1, own_cluster, left_out, leave_out)


def evaluation_rows(batch_u: Batch, batch_e: Batch | None, cross_fit: bool) -> EvaluationRows:
    """Return E, which is U itself where ``batch_e`` is None, and the clusters to leave out.

    Args:
        batch_u: update batch, n_u rows.
        batch_e: evaluation batch, or None.
        cross_fit: whether groups of ``batch_e`` that U has too are the same rollouts of the same prompts.

    Raises:
        ValueError: where U is part of E, for fewer than four prompts, and for a batch without ``group``.
    """
    if batch_e is None:
        group = prompt_index(batch_u) if batch_u.group is None else batch_u.group
        batch_e = batch_u._replace(coefficients=None, entropy_coefficients=None, group=group)
        own_cluster, leave_out = cluster_index(batch_e), True
    elif cross_fit:
        own_cluster = _shared_clusters(batch_u, batch_e)
        leave_out = bool((own_cluster != NOTHING_LEFT_OUT).any())
    else:
        return EvaluationRows(batch_e, torch.full_like(batch_u.input_ids[:, 0], NOTHING_LEFT_OUT), False)
    prompts = int(cluster_index(batch_e).max()) + 1
    if prompts < MIN_PROMPTS:
        raise ValueError(
            f"batch_e has rollouts of {prompts} prompts, those of batch_u among them; expected at least {MIN_PROMPTS}, "
            "since each rollout's influence is taken over the other prompts. Use more prompts in a step, or pass "
            "fresh rollouts as batch_e"
        )
    return EvaluationRows(batch_e, own_cluster, leave_out)


def _shared_clusters(batch_u: Batch, batch_e: Batch) -> Tensor:
    """Return the cluster of E that has the group of each row of U, int64 (n_u,), -1 where none has."""
    for field, batch in (("batch_u", batch_u), ("batch_e", batch_e)):
        if batch.group is None:
            raise ValueError(
                f"{field}.group is None with cross_fit=True; expected int64 (n,), equal for rollouts of one prompt in "
                "both batches. Pass the prompts' indices"
            )
    assert batch_u.group is not None
    assert batch_e.group is not None
    known, wanted = torch.unique(batch_e.group.long()), batch_u.group.long()
    index = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    return torch.where(known[index] == wanted, index, NOTHING_LEFT_OUT)
