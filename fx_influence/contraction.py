"""Per-sequence influences from the factors that one reverse pass leaves, at a forward's cost for many directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fx_influence.derivatives import live
from fx_influence.factors import Factors, bytes_per_token, factored_names, inner_products, row_factors
from fx_influence.parts import Part, parts
from fx_influence.policy import halves
from fx_influence.tree import accumulate, promote, unit_direction
from fx_influence.types import Apply, Batch, Gradients, Params

Contract = Callable[[Sequence[Params]], Tensor]
"""``contract(us)``: <u_k, g_i> for every row of the batch, (K, B) float64; names absent in a u count as 0."""


def directions_at_once(params: Params, memory_budget: int) -> int:
    """How many directions a ``Contract`` is given: they and their scaled copies take half of ``memory_budget``."""
    return max(1, memory_budget // (4 * sum(p.numel() * promote(p.dtype).itemsize for p in params.values())))


def gradient_and_contraction(
    params: Params,
    batch: Batch,
    apply: Apply,
    temperature: float,
    chunk_size: int | None,
    memory_budget: int,
    at_once: int = 1,
) -> tuple[Gradients, Contract] | None:
    """``batch_gradient``, and <u_k, g_i> of every row for any u_k, from one forward and one reverse pass.

    The factors of as many parts of the batch are kept as fit ``memory_budget`` bytes, those of the others made again,
    short of the weights, whenever they meet the ``at_once`` directions. None where a parameter has no factors, and
    where some would be made again for a single direction: a JVP costs as much.
    """
    policy = halves(apply)
    names = factored_names(params, batch, apply)
    pending = parts(batch, chunk_size, policy.aligned)
    per_token = bytes_per_token(params, batch, apply, names)
    sizes = [per_token * part.input_ids.numel() for part in pending]
    if params.keys() - names or (at_once == 1 and sum(sizes) > memory_budget):
        return None
    total: Gradients = dict.fromkeys(params)
    kept: list[tuple[Part, Factors | None]] = []
    for part, size in zip(pending, sizes, strict=True):
        factors, grads = row_factors(live(params), batch, part, apply, names, temperature)
        accumulate(total, grads.items())
        memory_budget -= size
        kept.append((part, factors if memory_budget >= 0 else None))

    def contract(us: Sequence[Params]) -> Tensor:
        scales, units = zip(*(unit_direction(u, params) for u in us), strict=True)
        out = torch.zeros(len(us), len(batch.input_ids), dtype=torch.float64, device=batch.input_ids.device)
        for part, factors in kept:
            own = row_factors(params, batch, part, apply, names, temperature)[0] if factors is None else factors
            out[:, part.members] = inner_products(own, units, len(part.members))
        return out * out.new_tensor(scales).unsqueeze(1)

    return total, contract
