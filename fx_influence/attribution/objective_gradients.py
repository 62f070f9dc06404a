"""The objective over E: its surrogates, and its gradient by random groups of E's clusters."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.autodiff.engine import Engine
from fx_influence.core.tree import promote
from fx_influence.estimators.stderr import random_group_index
from fx_influence.objectives import Entropy, Objective, denominator_shares, surrogate_coefficients
from fx_influence.types import Batch, Gradients, Params, TokenValues


class Evaluation(NamedTuple):
    """The objective over E: its surrogates' coefficients, and its gradient by random groups of E's clusters.

    ``batch``: E with coefficients. ``shares``: (n_e,), each row's share of the objective's denominator, adding up to 1.
    ``group``: int64 (n_e,), the random group of each row. ``num_groups``: number of these groups. ``gradients``: one
    for each group, computed when iterated over; they add up to grad H.
    """

    batch: Batch
    shares: Tensor
    group: Tensor
    num_groups: int
    gradients: Iterable[Params]


def evaluate_objective(
    params: Params,
    batch_e: Batch,
    objective: Entropy | Objective,
    in_groups: bool,
    engine: Engine,
    memory_budget: int,
    dtype: torch.dtype | None,
) -> Evaluation:
    """Return the objective's coefficients over E and its gradient, in total or by min(8, C) random groups of clusters.

    Args:
        params: theta by name.
        batch_e: evaluation batch, n_e rows.
        objective: whose gradient is wanted.
        in_groups: whether the gradient is split by groups.
        engine: engine of the policy with all its derivatives.
        memory_budget: bytes of the forward to cache for the reverse pass.
        dtype: of the gradients; None takes at least float32.
    """

    def with_coefficients(values: TokenValues) -> Batch:
        weights = surrogate_coefficients(objective, values, batch_e)
        return batch_e._replace(coefficients=weights.logprobs, entropy_coefficients=weights.entropies)

    shares = denominator_shares(objective, batch_e.completion_mask)
    group = random_group_index(batch_e) if in_groups else torch.zeros_like(batch_e.input_ids[:, 0])
    rows = [(group == k).nonzero().squeeze(-1) for k in range(int(group.max()) + 1)]
    weighted, gradients = engine.reweighted_gradients(params, batch_e, rows, with_coefficients, memory_budget, dtype)
    # Not a generator expression, whose frame would hold one gradient while the next is made.
    return Evaluation(weighted, shares, group, len(rows), map(partial(_ascent_, params, dtype), gradients))


def _ascent_(params: Params, dtype: torch.dtype | None, gradient: Gradients) -> Params:
    """Return the gradient of an objective from that of its loss, which is minus the objective; None counts as 0.

    The tensors given are reused.
    """
    return {
        name: torch.zeros_like(p, dtype=dtype or promote(p.dtype)) if (g := gradient[name]) is None else g.neg_()
        for name, p in params.items()
    }
