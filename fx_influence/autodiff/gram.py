"""Inner products of the gradients of two batches' rows, streamed under a memory budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.autodiff.ghost import thin_matmul
from fx_influence.autodiff.layer_io.support import layer_io_bytes_per_token, supported_names
from fx_influence.autodiff.rollout_gradients import Rows, _length, _rows, _vmapped
from fx_influence.batching.microbatch import TOKENS_PER_CHUNK, micro_batches
from fx_influence.batching.rows import select_rows
from fx_influence.core.tree import promote
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Params

MEMORY_BUDGET = 3 * 2**28
"""Bytes that ``gradient_gram`` holds at once where the caller names none: 768 MiB."""


Slices = dict[str, slice]
"""Parameters by name, with the entries of their first axis that are meant."""


def gradient_gram(
    params: Params,
    batch_a: Batch,
    batch_b: Batch,
    diagonal: Params,
    apply: Apply,
    temperature: float = 1.0,
    memory_budget: int = MEMORY_BUDGET,
    chunk_size: int | None = None,
    apply_b: Apply | None = None,
) -> Tensor:
    """K_ai = <g_a, D g_i> for the rollout losses of two batches, D diagonal; (n_a, n_b), at least float32.

    Where a parameter enters as a linear map, an embedding or an affine norm, the rows' gradients are made from factors
    (see ``factors``); every other parameter goes through ``vmap(grad)``, or where vmap cannot take the policy's rows,
    which two of them tell first, through a reverse pass a row. Of the batch with fewer rows a block of
    gradients, weighted by D, is held in up to two thirds of ``memory_budget`` bytes, and the other batch passes by, as
    many rows at once as the rest of the budget has room for. Where even one row's gradient is larger than that, the
    parameters are taken in several groups. ``chunk_size``: at most so many rows in one pass. ``apply_b``: of batch b,
    where its gradients are taken otherwise. Sums over parameters are in float64.
    """
    of_b = apply if apply_b is None else apply_b
    params = {name: p.detach() for name, p in params.items()}
    held = {name: p for name, p in params.items() if name in diagonal}
    dtype = promote(next(iter(params.values())).dtype)
    if len(batch_a.input_ids) < len(batch_b.input_ids):
        options = temperature, memory_budget, chunk_size
        return gradient_gram(params, batch_b, batch_a, diagonal, of_b, *options, apply_b=apply).T
    shape = len(batch_a.input_ids), len(batch_b.input_ids)
    total = torch.zeros(shape, dtype=torch.float64, device=batch_a.input_ids.device)
    factored = supported_names(params, batch_b, apply) & held.keys()
    per_token = max(1, layer_io_bytes_per_token(params, batch_b, apply, factored))
    others = {name: p for name, p in held.items() if name not in factored}
    vmapped = _vmapped(params, batch_b, others, apply, temperature)
    most = memory_budget * 2 // 3
    for group in _groups(held, most):
        size = min(shape[1], max(1, most // _row_bytes(held, group)))
        room = memory_budget - size * _row_bytes(held, group)
        source = _Source(params, held, group, factored, vmapped, per_token, of_b, temperature, room, chunk_size)
        for j in range(0, shape[1], size):
            block = select_rows(batch_b, slice(j, j + size))
            columns, weighted = _weighted(source.chunks(block), len(block.input_ids), held, group, diagonal)
            for index, rows_of in source._replace(apply=apply).chunks(batch_a):
                found = _inner(rows_of, len(index), weighted, held, group, room // 4)
                total[index.unsqueeze(1), j + columns] += found
            # Or two blocks would be held while the next is made.
            del weighted
    return total.to(dtype)


class _Source(NamedTuple):
    """Where rows' gradients of a group of parameters come from, within ``room`` bytes of factors and graph."""

    params: Params
    held: Params
    group: Slices
    factored: frozenset[str]
    vmapped: bool
    per_token: int
    apply: Apply
    temperature: float
    room: int
    chunk_size: int | None

    def chunks(self, batch: Batch) -> Iterator[tuple[Tensor, Rows]]:
        """Rows of a batch, as an index, with their gradients."""
        factored = self.factored & self.group.keys()
        others = {name: self.held[name] for name in self.group if name not in factored}
        limit = min(self.chunk_size or len(batch.input_ids), _rows_within(self.room // 2, others))
        # Besides the inputs and outputs of linear maps that it holds, a graph takes two to three times as much again.
        wanted = TOKENS_PER_CHUNK if self.chunk_size is None else self.chunk_size * batch.input_ids.shape[1]
        tokens = min(wanted, int(self.room / (4.5 * self.per_token)))
        for part in micro_batches(batch, None, split_policy(self.apply).left_alignable, tokens, limit):
            options = self.apply, self.temperature, self.vmapped
            yield part.row_index, _rows(self.params, batch, part, factored, others, *options)


def _groups(held: Params, room: int) -> Iterator[Slices]:
    """All parameters at once where the gradient of a row fits ``room``, else in groups of slices that do."""
    group: Slices = {}
    used = 0
    for name, p in held.items():
        entry = p.numel() // max(1, _length(p)) * promote(p.dtype).itemsize
        start = 0
        while start < _length(p):
            step = min(_length(p) - start, max(1, (room - used) // max(1, entry)))
            if group and (used + step * entry > room or name in group):
                yield group
                group, used = {}, 0
                continue
            group[name] = slice(start, start + step)
            start, used = start + step, used + step * entry
    if group:
        yield group


def _rows_within(room: int, held: Params) -> int:
    return max(1, room // max(1, sum(p.numel() * promote(p.dtype).itemsize for p in held.values())))


def _row_bytes(held: Params, group: Slices) -> int:
    return sum(_numel(held[name], part) * promote(held[name].dtype).itemsize for name, part in group.items())


def _numel(p: Tensor, part: slice) -> int:
    return p.numel() // _length(p) * (part.stop - part.start)


def _weighted(
    chunks: Iterable[tuple[Tensor, Rows]], count: int, held: Params, group: Slices, diagonal: Params
) -> tuple[Tensor, Params]:
    """The rows in the order they come, and D g_i of each, (count, numel) by name."""
    out = {
        name: held[name].new_empty(count, _numel(held[name], part), dtype=promote(held[name].dtype))
        for name, part in group.items()
    }
    order: list[Tensor] = []
    start = 0
    for index, rows_of in chunks:
        for name, part in group.items():
            own = out[name][start : start + len(index)]
            rows_of(name, part, own)
            own.mul_(diagonal[name].to(own.dtype).reshape(_length(held[name]), -1)[part].flatten())
        order.append(index)
        start += len(index)
    return torch.cat(order), out


def _inner(rows_of: Rows, count: int, weighted: Params, held: Params, group: Slices, room: int) -> Tensor:
    """(n_a, n_b), float64, of ``count`` rows a; ``room``: bytes that a slice of their gradients may take."""
    total: Tensor | None = None
    scratch: Tensor | None = None
    for name, right in weighted.items():
        whole = group[name]
        inner = held[name].numel() // _length(held[name])
        step = min(whole.stop - whole.start, max(1, room // (count * inner * right.element_size())))
        if scratch is None or len(scratch) < count * step * inner or scratch.dtype != right.dtype:
            scratch = right.new_empty(count * step * inner)
        for start in range(whole.start, whole.stop, step):
            part = slice(start, min(start + step, whole.stop))
            columns = slice((part.start - whole.start) * inner, (part.stop - whole.start) * inner)
            own = scratch[: count * (columns.stop - columns.start)].view(count, -1)
            rows_of(name, part, own)
            product = thin_matmul(own, right[:, columns]).double()
            total = product if total is None else total + product
    assert total is not None
    return total
