"""Per-sequence influences from the factors that one reverse pass leaves, at a forward's cost for many directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fx_influence.autodiff.gradients import as_leaves
from fx_influence.autodiff.layer_io.collect import collect_layer_io
from fx_influence.autodiff.layer_io.row_gradients import (
    BLOCK_COLUMNS,
    MAX_GRADIENT_ENTRIES,
    LayerIO,
    LayerIOs,
    write_row_gradients,
)
from fx_influence.autodiff.layer_io.support import layer_io_bytes_per_token, supported_names
from fx_influence.batching.microbatch import MicroBatch, micro_batches
from fx_influence.core.tree import accumulate, promote, unit_direction
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Gradients, Params

JvpFn = Callable[[Sequence[Params]], Tensor]
"""``contract(us)``: <u_k, g_i> for every row of the batch, (K, B) float64; names absent in a u count as 0."""


def max_directions(params: Params, memory_budget: int) -> int:
    """How many directions a ``JvpFn`` is given: they and their scaled copies take half of ``memory_budget``."""
    return max(1, memory_budget // (4 * sum(p.numel() * promote(p.dtype).itemsize for p in params.values())))


def linearize_losses(
    params: Params,
    batch: Batch,
    apply: Apply,
    temperature: float,
    chunk_size: int | None,
    memory_budget: int,
    at_once: int = 1,
) -> tuple[Gradients, JvpFn] | None:
    """``batch_gradient``, and <u_k, g_i> of every row for any u_k, from one forward and one reverse pass.

    The factors of as many parts of the batch are kept as fit ``memory_budget`` bytes, those of the others made again,
    short of the weights, whenever they meet the ``at_once`` directions. None where a parameter has no factors, and
    where some would be made again for a single direction: a JVP costs as much.
    """
    policy = split_policy(apply)
    names = supported_names(params, batch, apply)
    pending = micro_batches(batch, chunk_size, policy.left_alignable)
    per_token = layer_io_bytes_per_token(params, batch, apply, names)
    sizes = [per_token * part.input_ids.numel() for part in pending]
    if params.keys() - names or (at_once == 1 and sum(sizes) > memory_budget):
        return None
    total: Gradients = dict.fromkeys(params)
    kept: list[tuple[MicroBatch, LayerIOs | None]] = []
    for part, size in zip(pending, sizes, strict=True):
        factors, grads = collect_layer_io(as_leaves(params), batch, part, apply, names, temperature)
        accumulate(total, grads.items())
        memory_budget -= size
        kept.append((part, factors if memory_budget >= 0 else None))

    def contract(us: Sequence[Params]) -> Tensor:
        scales, units = zip(*(unit_direction(u, params) for u in us), strict=True)
        out = torch.zeros(len(us), len(batch.input_ids), dtype=torch.float64, device=batch.input_ids.device)
        for part, factors in kept:
            own = collect_layer_io(params, batch, part, apply, names, temperature)[0] if factors is None else factors
            out[:, part.row_index] = inner_products(own, units, len(part.row_index))
        return out * out.new_tensor(scales).unsqueeze(1)

    return total, contract


def inner_products(factors: LayerIOs, directions: Sequence[Params], rows: int) -> Tensor:
    """<g_i, u_k> of every row's gradient with directions u_k over the parameters that have factors, (K, rows) float64.

    For one direction no gradient is formed: a linear map's is sum_s g_s . (x_s u^T), one product of the size of its
    forward. For several they are, some of a weight's entries at a time, at that cost once and little for each u_k.
    Source: the ghost dot product, Wang et al. 2024, arXiv 2406.11011.
    """
    device = next(iter(directions[0].values())).device
    total = torch.zeros(len(directions), rows, dtype=torch.float64, device=device)
    for name, uses in factors.items():
        along = [u[name] for u in directions]
        for use in uses:
            if len(along) > 1 and use.kind in ("linear", "transposed"):
                total += _through_gradients(use, along)
            else:
                total += torch.stack([_inner_product(use, u) for u in along])
    return total


def _through_gradients(factor: LayerIO, along: Sequence[Tensor]) -> Tensor:
    u = torch.stack(list(along)).to(promote(factor.grads.dtype))
    count, inner = len(factor.grads), u[0, 0].numel()
    step = max(1, MAX_GRADIENT_ENTRIES // (count * inner))
    total = torch.zeros(len(u), count, dtype=torch.float64, device=u.device)
    for start in range(0, u.shape[1], step):
        part = slice(start, min(start + step, u.shape[1]))
        own = u.new_empty(count, part.stop - part.start, inner)
        write_row_gradients(factor, part, own, add=False)
        total += thin_matmul(u[:, part].flatten(1), own.flatten(1))
    return total


def thin_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of few rows and very many columns: cut into short pieces, where BLAS is twice as fast."""
    whole = a.shape[1] // BLOCK_COLUMNS * BLOCK_COLUMNS
    out = a[:, whole:] @ b[:, whole:].T
    if whole:
        left, right = (x[:, :whole].unflatten(1, (-1, BLOCK_COLUMNS)).transpose(0, 1) for x in (a, b))
        out += torch.bmm(left, right.mT).sum(0)
    return out


def _inner_product(factor: LayerIO, u: Tensor) -> Tensor:
    kind, x, g = factor
    # Factors in half precision are numbers of float32 too, and their product is made there.
    dtype = promote(g.dtype)
    u = u.to(dtype)
    if x is None:
        mapped = u
    elif kind == "embedding":
        mapped = F.embedding(x, u)
    elif kind == "scale":
        mapped = x * u
    else:
        mapped = x.to(dtype) @ (u.T if kind == "linear" else u)
    return (mapped * g).sum((1, 2), dtype=dtype).double()
