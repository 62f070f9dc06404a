"""The Fisher kernel, from one gradient per sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_influence.testing.gradients import gradient, inner, scale, tracked
from fx_influence.testing.scores import score_row
from fx_influence.types import Apply, Batch, Gradients, Params


def fisher_kernel(
    apply: Apply,
    params: Params,
    batch_a: Batch,
    batch_b: Batch,
    diagonals: Params | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return K_ai = <grad S_a, P grad S_i>, (n_a, n_b), with S = sum_t log pi.

    Args:
        apply: the policy.
        params: the parameters by name.
        batch_a: (n_a, T), the rows of K.
        batch_b: (n_b, T), the columns of K.
        diagonals: P by name, 0 for an absent name; ``None`` is the identity.
        temperature: divisor of the logits.
    """
    params = tracked(params)
    sides: list[list[Gradients]] = []
    for batch in (batch_a, batch_b):
        rows = [score_row(apply, params, batch, a, temperature) for a in range(len(batch.input_ids))]
        sides.append([gradient(sum(row.logprobs, row.zero), params) for row in rows])
    p = {name: torch.ones_like(x) for name, x in params.items()} if diagonals is None else diagonals
    return torch.tensor(
        [[inner(x, scale(p, {k: v for k, v in y.items() if k in p})) for y in sides[1]] for x in sides[0]],
        dtype=torch.float64,
    )
