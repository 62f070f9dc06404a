"""Inner products <u, g_i> of rows' gradients with directions from layer IO, without forming the gradients.

One reverse pass over the batch records the inputs and output gradients of its layers. Each direction then costs about
a forward pass, many directions together little more than one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from fx_influence.autodiff.gradients import as_leaves, batch_gradient
from fx_influence.autodiff.layer_io.collect import collect_layer_io, collect_layer_ios
from fx_influence.autodiff.layer_io.grouped_jvp import GroupedTokenJvp
from fx_influence.autodiff.layer_io.row_gradients import LayerIO, LayerIOs, sum_of_row_gradients, write_row_gradients
from fx_influence.autodiff.layer_io.support import layer_io_bytes_per_token, supported_names
from fx_influence.batching.microbatch import MicroBatch, micro_batches
from fx_influence.batching.rows import group_of_rows, places_by_group, select_rows
from fx_influence.core.dtensor import to_local
from fx_influence.core.tree import DirectionDifference, accumulate, cast_like, promote, unit_direction
from fx_influence.policy.modes.linear_cache import LinearOutputCache
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Gradients, Params, TokenValues

MAX_GRADIENT_ENTRIES, CPU_GRADIENT_ENTRIES = 2**24, 2**21
"""Largest number of entries of row gradients that exist at once in ``ghost_products``: 64 MiB of float32 on an
accelerator, 8 MiB on a CPU, whose caches hold these until they are multiplied: in half the time."""

BLOCK_COLUMNS = 1024
"""Columns per block of ``thin_matmul``."""

MEMORY_BUDGET = 3 * 2**28
"""Bytes of a call's caches where the caller sets no budget: 768 MiB."""

BYTES_PER_PARAMETER = 16
"""Bytes of a call's caches for each trainable parameter, used where that is more: eight directions in bfloat16."""

LARGEST_BUDGET = 2**32
"""Largest number of bytes of a call's caches that the caller has not asked for: beside a large model's training state
there is no room for as much again."""

TokenDirections = Sequence[DirectionDifference]
"""The direction of the token values of each group of rows, all with the same minuend."""


class LossDerivatives(NamedTuple):
    """Derivatives of a batch's losses along K directions.

    Attributes:
        rows: (K, B), float64, <u_k, g_i>.
        parts: (P, K, B), likewise of each further loss of the rows.
        tokens: those of the token values, of each group of rows along its own direction, (B, T) each; or None.
    """

    rows: Tensor
    parts: Tensor
    tokens: TokenValues | None


JvpFn = Callable[[Sequence[Params], TokenDirections | None], LossDerivatives]
"""``jvp_fn(us, directions)``: the derivatives along the u_k, and those of tokens along the ``directions`` where these
are not None. Names absent in a direction count as 0."""


def default_budget(params: Params) -> int:
    """Return the bytes of a call's caches where the caller sets no budget.

    Example:
        >>> [default_budget({"w": torch.empty(n, device="meta")}) >> 20 for n in (10**6, 10**8, 10**10)]
        [768, 1525, 4096]
    """
    wanted = BYTES_PER_PARAMETER * sum(to_local(p).numel() for p in params.values())
    return max(MEMORY_BUDGET, min(wanted, LARGEST_BUDGET))


class DirectionPlan(NamedTuple):
    """Number of directions that are in memory ``at_once``, and their ``dtype``; None leaves it as it is."""

    at_once: int
    dtype: torch.dtype | None


def plan_directions(params: Params, count: int, memory_budget: int) -> DirectionPlan:
    """Return the plan for ``count`` directions: in bfloat16 where they do not fit ``memory_budget`` bytes otherwise.

    Args:
        params: the parameters, whose shapes and dtypes the directions have.
        count: number of directions that are wanted.
        memory_budget: bytes of directions in memory at once.
    """
    local = [to_local(p) for p in params.values()]
    if count * sum(p.numel() * promote(p.dtype).itemsize for p in local) <= memory_budget:
        return DirectionPlan(count, None)
    at_once = min(count, memory_budget // sum(2 * p.numel() for p in local))
    return DirectionPlan(at_once, torch.bfloat16) if at_once > 1 else DirectionPlan(1, None)


def linearize_losses(
    params: Params,
    batch: Batch,
    apply: Apply,
    temperature: float,
    chunk_size: int | None,
    memory_budget: int,
    num_directions: int = 1,
    with_gradient: bool = True,
    groups: Sequence[Tensor] | None = None,
    parts: Sequence[Batch] = (),
) -> tuple[Gradients, JvpFn] | None:
    """Return ``batch_gradient`` and the function ``JvpFn`` of the rows' losses, from one forward and reverse pass.

    The layer IO of as many micro-batches is cached as fits the budget, and the linear layers' outputs where these fit
    beside all of it. That of the others is recomputed, without the weights' gradients, in every call of the function.
    Either way the JVP of the token values reuses the outputs of that forward. Where rows share prompts it has its own,
    in which each prompt is there once.

    Args:
        params: theta, by name.
        batch: rollouts with coefficients, (B, T).
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
        chunk_size: rows per forward; None chooses by tokens.
        memory_budget: bytes of layer IO to cache.
        num_directions: number of directions that the function will be given per call.
        with_gradient: whether the gradient is wanted; without it the reverse pass stops short of the weights, and all
            gradients are None.
        groups: index tensors of the rows whose token values have a direction in common; every row is in one of them.
            None is one group of all rows.
        parts: the same rollouts with coefficients of further losses, each of which takes a reverse pass over the same
            forward.

    Returns:
        The gradient and the ``JvpFn``; None where a parameter has no layer IO, and where some of it would be
        recomputed for a single direction, since a JVP costs no more.
    """
    policy = split_policy(apply)
    names = supported_names(params, batch, apply)
    every_row = [torch.arange(len(batch.input_ids), device=batch.input_ids.device)]
    groups = every_row if groups is None else groups
    pending = [
        x.of_rows(index, batch)
        for index in (groups if policy.backbone_grouped_jvp is None else every_row)
        if len(index)
        for x in micro_batches(select_rows(batch, index), chunk_size, policy.left_alignable)
    ]
    # The inputs are those of all losses, so that this is more than they take.
    per_token = layer_io_bytes_per_token(params, batch, apply, names) * (1 + len(parts))
    sizes = [per_token * micro_batch.input_ids.numel() for micro_batch in pending]
    if params.keys() - names or (num_directions == 1 and sum(sizes) > memory_budget):
        return None
    total: Gradients = dict.fromkeys(params)
    differentiated = as_leaves(params) if with_gradient else params
    cached: list[_Linearized | None] = []
    remaining, spare = memory_budget, memory_budget - sum(sizes)

    def linearized(params: Params, micro_batch: MicroBatch, max_bytes: int) -> tuple[_Linearized, Gradients]:
        # Function modes do not see compiled code, so a compiled forward could not reuse what an eager one stored.
        outputs = None if policy.compiled or max_bytes <= 0 else LinearOutputCache(max_bytes)
        options = micro_batch, apply, names, temperature, outputs
        layer_ios, grads = collect_layer_ios(params, [batch, *parts], *options)
        return _Linearized(layer_ios, None if outputs is None else outputs.outputs), grads

    for micro_batch, size in zip(pending, sizes, strict=True):
        remaining -= size
        if remaining < 0 and not with_gradient:
            cached.append(None)
            continue
        entry, grads = linearized(differentiated, micro_batch, spare)
        accumulate(total, grads.items())
        cached.append(entry if remaining >= 0 else None)
        spare -= 0 if entry.outputs is None else sum(x.numel() * x.element_size() for x in entry.outputs)
        del entry

    def jvp_fn(us: Sequence[Params], directions: TokenDirections | None) -> LossDerivatives:
        scales, units = zip(*(unit_direction(u, params) for u in us), strict=True)
        shape = 1 + len(parts), len(us), len(batch.input_ids)
        out = torch.zeros(shape, dtype=torch.float64, device=batch.input_ids.device)
        token_jvp = None
        if directions is not None:
            token_jvp = GroupedTokenJvp(params, batch, policy, temperature, chunk_size, groups, directions, pending)
        for micro_batch, entry in zip(pending, cached, strict=True):
            if entry is None:
                wanted = 0 if token_jvp is None or token_jvp.has_own_forward else sys.maxsize
                entry = linearized(params, micro_batch, wanted)[0]
            for by_row, layer_ios in zip(out, entry.layer_ios, strict=True):
                if layer_ios:
                    by_row[:, micro_batch.row_index] = ghost_products(layer_ios, units, len(micro_batch.row_index))
            outputs = entry.outputs
            # Released before the JVP, and before the next micro-batch is recomputed, so that two never exist at once.
            del entry
            if token_jvp is not None:
                token_jvp.add(micro_batch, outputs)
            del outputs
        out *= out.new_tensor(scales).unsqueeze(1)
        return LossDerivatives(out[0], out[1:], None if token_jvp is None else token_jvp.values())

    return total, jvp_fn


def gradients_by_group(
    params: Params,
    batch: Batch,
    groups: Sequence[Tensor],
    apply: Apply,
    temperature: float,
    chunk_size: int | None,
    memory_budget: int,
) -> list[Gradients]:
    """Return ``batch_gradient`` of each group of rows.

    Where every parameter has layer IO, rows of all groups share their micro-batches, and each group's gradient is a
    product of its rows' layer inputs and output gradients.

    Args:
        params: theta, by name.
        batch: rollouts with coefficients, (B, T).
        groups: index tensors of rows.
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
        chunk_size: rows per forward; None chooses by tokens.
        memory_budget: bytes of a micro-batch's layer IO.
    """
    rows = torch.cat(list(groups))
    if not len(rows):
        return [dict.fromkeys(params) for _ in groups]
    policy, names = split_policy(apply), supported_names(params, batch, apply)
    pending = micro_batches(select_rows(batch, rows), chunk_size, policy.left_alignable)
    largest = max(micro_batch.input_ids.numel() for micro_batch in pending)
    if params.keys() - names or layer_io_bytes_per_token(params, batch, apply, names) * largest > memory_budget:
        by_group = (select_rows(batch, x) if len(x) else None for x in groups)
        options = apply, temperature, chunk_size
        return [dict.fromkeys(params) if x is None else batch_gradient(params, x, *options) for x in by_group]
    number, pending = group_of_rows(groups, batch), [x.of_rows(rows, batch) for x in pending]
    places = places_by_group([number[x.row_index] for x in pending], len(groups))
    total: list[Gradients] = [dict.fromkeys(params) for _ in groups]
    for micro_batch, members in zip(pending, places, strict=True):
        layer_ios, _ = collect_layer_io(params, batch, micro_batch, apply, names, temperature)
        for gradient, index in zip(total, members, strict=True):
            if len(index):
                sums = (
                    (name, sum_of_row_gradients(x, index, params[name])) for name, y in layer_ios.items() for x in y
                )
                accumulate(gradient, sums)
    return total


class _Linearized(NamedTuple):
    """Layer IO of a micro-batch by loss, and the outputs of its linear layers where they are at hand."""

    layer_ios: list[LayerIOs]
    outputs: list[Tensor] | None


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
    device = next((use.grads.device for uses in layer_ios.values() for use in uses), None)
    total = torch.zeros(len(directions), rows, dtype=torch.float64, device=device)
    for name, uses in layer_ios.items():
        like = next((u[name] for u in directions if name in u), None)
        if like is None:
            continue
        us = [u[name] if name in u else torch.zeros_like(like) for u in directions]
        for use in uses:
            if len(us) > 1 and use.kind in ("linear", "transposed"):
                total += _products_through_gradients(use, us)
            else:
                total += torch.stack([_product_without_gradient(use, u) for u in us])
    return total


def _products_through_gradients(use: LayerIO, directions: Sequence[Tensor]) -> Tensor:
    """Return <g_i, u_k>, (K, rows) float64, from the rows' gradients of some entries of the first axis at a time."""
    rows, (length, inner) = len(use.grads), directions[0].shape
    on_cpu = use.grads.device.type == "cpu"
    limit = min(MAX_GRADIENT_ENTRIES, CPU_GRADIENT_ENTRIES) if on_cpu else MAX_GRADIENT_ENTRIES
    step = max(1, limit // (max(rows, len(directions)) * inner))
    total = torch.zeros(len(directions), rows, dtype=torch.float64, device=use.grads.device)
    for start in range(0, length, step):
        entries = slice(start, min(start + step, length))
        grads = use.grads.new_empty(rows, entries.stop - entries.start, inner, dtype=promote(use.grads.dtype))
        write_row_gradients(use, entries, grads, add=False)
        u = torch.stack([cast_like(direction[entries], grads) for direction in directions])
        total += thin_matmul(u.flatten(1), grads.flatten(1))
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
    if x is not None and kind == "embedding":
        # Only the rows that are looked up are cast.
        return (F.embedding(x, u.to(x.device)).to(dtype) * g).sum((1, 2), dtype=dtype).double()
    u = u.to(g.device, dtype)
    if x is None:
        mapped = u
    elif kind == "scale":
        mapped = x * u
    else:
        mapped = x.to(dtype) @ (u.T if kind == "linear" else u)
    return (mapped * g).sum((1, 2), dtype=dtype).double()
