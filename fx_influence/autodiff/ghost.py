"""Inner products <u, g_i> of rows' gradients with directions from layer IO, without forming the gradients.

One reverse pass over the batch records the inputs and output gradients of its layers. Each direction then costs about
a forward pass, many directions together little more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from fx_influence.autodiff.gradients import as_leaves
from fx_influence.autodiff.layer_io.collect import collect_layer_io
from fx_influence.autodiff.layer_io.row_gradients import LayerIO, LayerIOs, write_row_gradients
from fx_influence.autodiff.layer_io.support import layer_io_bytes_per_token, supported_names
from fx_influence.batching.microbatch import MicroBatch, micro_batches
from fx_influence.core.tree import accumulate, promote, unit_direction
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Gradients, Params

MAX_GRADIENT_ENTRIES = 2**24
"""Entries of rows' gradients that exist at once in ``ghost_products``: 64 MiB of float32."""

BLOCK_COLUMNS = 1024
"""Columns per block of ``thin_matmul``."""

JvpFn = Callable[[Sequence[Params]], Tensor]
"""``jvp_fn(us)``: <u_k, g_i> for every row of the batch, (K, B) float64; names absent in a u count as 0."""


def max_directions(params: Params, memory_budget: int) -> int:
    """Return how many directions a ``JvpFn`` takes: they and scaled copies take half of ``memory_budget``."""
    return max(1, memory_budget // (4 * sum(p.numel() * promote(p.dtype).itemsize for p in params.values())))


def linearize_losses(
    params: Params,
    batch: Batch,
    apply: Apply,
    temperature: float,
    chunk_size: int | None,
    memory_budget: int,
    num_directions: int = 1,
) -> tuple[Gradients, JvpFn] | None:
    """Return ``batch_gradient`` and the function ``JvpFn`` of the rows' losses, from one forward and reverse pass.

    The layer IO of as many micro-batches is cached as fits the budget. That of the others is recomputed, without the
    weights' gradients, in every call of the function.

    Args:
        params: theta, by name.
        batch: rollouts with coefficients, (B, T).
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
        chunk_size: rows per forward; None chooses by tokens.
        memory_budget: bytes of layer IO to cache.
        num_directions: number of directions that the function will be given per call.

    Returns:
        The gradient and the ``JvpFn``; None where a parameter has no layer IO, and where some of it would be
        recomputed for a single direction, since a JVP costs no more.
    """
    policy = split_policy(apply)
    names = supported_names(params, batch, apply)
    pending = micro_batches(batch, chunk_size, policy.left_alignable)
    per_token = layer_io_bytes_per_token(params, batch, apply, names)
    sizes = [per_token * micro_batch.input_ids.numel() for micro_batch in pending]
    if params.keys() - names or (num_directions == 1 and sum(sizes) > memory_budget):
        return None
    total: Gradients = dict.fromkeys(params)
    cached: list[tuple[MicroBatch, LayerIOs | None]] = []
    remaining = memory_budget
    for micro_batch, size in zip(pending, sizes, strict=True):
        layer_ios, grads = collect_layer_io(as_leaves(params), batch, micro_batch, apply, names, temperature)
        accumulate(total, grads.items())
        remaining -= size
        cached.append((micro_batch, layer_ios if remaining >= 0 else None))

    def jvp_fn(us: Sequence[Params]) -> Tensor:
        scales, units = zip(*(unit_direction(u, params) for u in us), strict=True)
        out = torch.zeros(len(us), len(batch.input_ids), dtype=torch.float64, device=batch.input_ids.device)
        for micro_batch, layer_ios in cached:
            if layer_ios is None:
                layer_ios = collect_layer_io(params, batch, micro_batch, apply, names, temperature)[0]
            out[:, micro_batch.row_index] = ghost_products(layer_ios, units, len(micro_batch.row_index))
            # Released before the next micro-batch is recomputed, or two would exist at once.
            del layer_ios
        return out * out.new_tensor(scales).unsqueeze(1)

    return total, jvp_fn


def ghost_products(layer_ios: LayerIOs, directions: Sequence[Params], rows: int) -> Tensor:
    """Return <g_i, u_k> of every row's gradient with directions over the parameters that have layer IO.

    For one direction no gradient is formed: a linear map's product is sum_s g_s . (x_s u^T), one matrix product of the
    size of its forward. For several directions the rows' gradients are formed once, some of a weight's entries at a
    time, and each direction adds little.

    Args:
        layer_ios: layer IO of the rows, by parameter.
        directions: K directions u_k, by name.
        rows: number of rows B.

    Returns:
        (K, B), float64.

    Source: the ghost dot product, Wang et al. 2024, arXiv 2406.11011.
    """
    device = next(iter(directions[0].values())).device
    total = torch.zeros(len(directions), rows, dtype=torch.float64, device=device)
    for name, uses in layer_ios.items():
        us = [u[name] for u in directions]
        for use in uses:
            if len(us) > 1 and use.kind in ("linear", "transposed"):
                total += _products_through_gradients(use, us)
            else:
                total += torch.stack([_product_without_gradient(use, u) for u in us])
    return total


def _products_through_gradients(use: LayerIO, directions: Sequence[Tensor]) -> Tensor:
    """Return <g_i, u_k>, (K, rows) float64, from the rows' gradients of some entries of the first axis at a time."""
    u = torch.stack(list(directions)).to(promote(use.grads.dtype))
    rows, inner = len(use.grads), u[0, 0].numel()
    step = max(1, MAX_GRADIENT_ENTRIES // (rows * inner))
    total = torch.zeros(len(u), rows, dtype=torch.float64, device=u.device)
    for start in range(0, u.shape[1], step):
        entries = slice(start, min(start + step, u.shape[1]))
        grads = u.new_empty(rows, entries.stop - entries.start, inner)
        write_row_gradients(use, entries, grads, add=False)
        total += thin_matmul(u[:, entries].flatten(1), grads.flatten(1))
    return total


def thin_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T, (n, N) times (N, m), of few rows and very many columns.

    The columns are cut into short blocks whose products are summed, because BLAS is twice as fast on these.
    """
    n = a.shape[1] // BLOCK_COLUMNS * BLOCK_COLUMNS
    out = a[:, n:] @ b[:, n:].T
    if n:
        # Not einsum over block and inner together, which would be a single a b^T again.
        left, right = (rearrange(x[:, :n], "row (block inner) -> block row inner", inner=BLOCK_COLUMNS) for x in (a, b))
        out += reduce(torch.bmm(left, right.mT), "block i j -> i j", "sum")
    return out


def _product_without_gradient(use: LayerIO, u: Tensor) -> Tensor:
    """Return <g_i, u> of one use, (rows,) float64, as the sum over positions of the output gradient times f(x, u)."""
    kind, x, g = use
    # Layer IO in half precision is exact in float32, and the product is taken there.
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
