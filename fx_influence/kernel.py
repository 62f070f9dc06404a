"""Inner products of the gradients of two batches' rows, streamed under a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from fx_influence.factors import factored_names, row_factors, row_gradients
from fx_influence.grads import per_sample_grads, rollout_loss
from fx_influence.logprobs import TOKENS_PER_CHUNK, row_chunks
from fx_influence.tree import promote
from fx_influence.types import Apply, Batch, Params

MEMORY_BUDGET = 2**30
"""Bytes that ``gradient_kernel`` holds at once where the caller names none."""

Rows = Callable[[str, slice], Tensor]
"""``rows(name, part)``: every row's gradient of the entries ``part`` of a parameter's first axis, (B, n)."""


def gradient_kernel(
    params: Params,
    batch_a: Batch,
    batch_b: Batch,
    diagonal: Params,
    apply: Apply,
    temperature: float = 1.0,
    memory_budget: int = MEMORY_BUDGET,
    chunk_size: int | None = None,
) -> Tensor:
    """K_ai = <g_a, D g_i> for the rollout losses of two batches, D diagonal; (n_a, n_b), at least float32.

    Where a parameter enters as a linear map, an embedding or an affine norm, the rows' gradients are made from factors
    (see ``factors``); every other parameter goes through ``vmap(grad)``. Gradients of a block of ``batch_b``, weighted
    by D once, take up to half of ``memory_budget`` bytes, whatever the number of rows; those of ``batch_a`` pass by
    each block a chunk of rows and a slice of a parameter at a time, a quarter of it each. The activations and factors
    of ``chunk_size`` rows come on top. Sums over parameters are in float64.
    """
    params = {name: p.detach() for name, p in params.items()}
    held = {name: p for name, p in params.items() if name in diagonal}
    dtype = promote(next(iter(params.values())).dtype)
    shape = len(batch_a.input_ids), len(batch_b.input_ids)
    total = torch.zeros(shape, dtype=torch.float64, device=batch_a.input_ids.device)
    if not held:
        return total.to(dtype)
    factored = factored_names(params, batch_b, apply) & held.keys()
    others = {name: p for name, p in held.items() if name not in factored}
    room = memory_budget // 4

    def chunks(batch: Batch) -> Iterator[tuple[int, Rows]]:
        at_once = chunk_size or max(1, TOKENS_PER_CHUNK // batch.input_ids.shape[1])
        for part in row_chunks(batch, min(at_once, _rows_within(room, others))):
            yield len(part.input_ids), _rows(params, part, factored, others, apply, temperature)

    size = _rows_within(2 * room, held)
    for j, block in enumerate(row_chunks(batch_b, size)):
        weighted = _weighted(chunks(block), len(block.input_ids), held, diagonal)
        products = [_inner(rows, weighted, held, room // count) for count, rows in chunks(batch_a)]
        total[:, j * size : (j + 1) * size] = torch.cat(products)
    return total.to(dtype)


def rollout_gradients(params: Params, batch: Batch, apply: Apply, temperature: float = 1.0) -> Params:
    """The gradient of every row's rollout loss, (B, ...) by name, at least float32; see ``grads.rollout_loss``.

    What ``per_sample_grads(rollout_loss(apply, temperature), params, batch)`` gives, from factors where there are some.

    Example:
        >>> ids = torch.tensor([[1, 2]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True]]), coefficients=torch.tensor([[0.0, 1.0]]))
        >>> apply = lambda params, ids, mask: params["b"].expand(*ids.shape, 4)
        >>> rollout_gradients({"b": torch.zeros(4)}, batch, apply)["b"].tolist()
        [[0.25, 0.25, -0.75, 0.25]]
    """
    params = {name: p.detach() for name, p in params.items()}
    factored = factored_names(params, batch, apply)
    others = {name: p for name, p in params.items() if name not in factored}
    rows = _rows(params, batch, factored, others, apply, temperature)
    return {name: rows(name, slice(0, _length(p))).reshape(-1, *p.shape) for name, p in params.items()}


def _rows_within(room: int, held: Params) -> int:
    size = sum(p.numel() * promote(p.dtype).itemsize for p in held.values())
    return max(1, room // max(1, size))


def _rows(
    params: Params, batch: Batch, factored: frozenset[str], others: Params, apply: Apply, temperature: float
) -> Rows:
    count = len(batch.input_ids)
    factors = row_factors(params, batch, apply, factored, temperature) if factored else {}
    loss = rollout_loss(lambda p, ids, mask: apply({**params, **p}, ids, mask), temperature)
    rest = per_sample_grads(loss, others, batch) if others else {}

    def rows(name: str, part: slice) -> Tensor:
        p = params[name]
        if name in rest:
            return rest[name].to(promote(p.dtype)).reshape(count, _length(p), -1)[:, part].flatten(1)
        return row_gradients(factors, name, p, part, count).flatten(1)

    return rows


def _weighted(chunks: Iterable[tuple[int, Rows]], count: int, held: Params, diagonal: Params) -> Params:
    """D g_i of every row, (count, numel) by name."""
    out = {name: p.new_empty(count, p.numel(), dtype=promote(p.dtype)) for name, p in held.items()}
    start = 0
    for n, rows in chunks:
        for name, p in held.items():
            weight = diagonal[name].to(out[name].dtype).flatten()
            torch.mul(rows(name, slice(0, _length(p))), weight, out=out[name][start : start + n])
        start += n
    return out


def _inner(rows: Rows, weighted: Params, held: Params, room: int) -> Tensor:
    """(n_a, n_b), float64; ``room``: bytes that a slice of one row may take."""
    total: Tensor | None = None
    for name, right in weighted.items():
        length, width = _length(held[name]), right.shape[1]
        inner = width // max(1, length)
        step = max(1, room // max(1, inner * right.element_size()))
        for start in range(0, length, step):
            part = slice(start, min(start + step, length))
            product = (rows(name, part) @ right[:, part.start * inner : part.stop * inner].T).double()
            total = product if total is None else total + product
    assert total is not None
    return total


def _length(p: Tensor) -> int:
    return len(p) if p.dim() else 1
