"""Gram matrix of the gradients of two batches' rows under a diagonal metric, streamed within a memory budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.autodiff.ghost import MEMORY_BUDGET, thin_matmul
from fx_influence.autodiff.layer_io.support import layer_io_bytes_per_token
from fx_influence.autodiff.rollout_gradients import (
    RowGradientSource,
    RowGradientWriter,
    first_axis_length,
    row_gradient_source,
)
from fx_influence.batching.microbatch import TOKENS_PER_CHUNK, micro_batches
from fx_influence.batching.rows import select_rows
from fx_influence.core.tree import detached, promote
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Params

Slices = dict[str, slice]
"""Parameters by name, with a range of entries of their first axis."""


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
    """Return K_ai = <g_a, D g_i> for the rollout losses of two batches, D diagonal.

    Where a parameter enters as a linear map, an embedding or an affine norm, the rows' gradients come from layer IO
    (see ``layer_io``). Every other parameter goes through ``vmap(grad)``, or through a reverse pass per row where vmap
    cannot take the policy's rows, as a probe of two rows decides. A block of D-weighted gradients of the batch
    with fewer rows is held in up to two thirds of the budget; the gradients of the other batch are streamed past it, as
    many rows at once as fit the remaining third. Where even one row's gradient exceeds the block, the
    parameters are taken in several groups. Sums over parameters are in float64.

    Args:
        params: theta, by name.
        batch_a: rollouts with coefficients, (n_a, T).
        batch_b: rollouts with coefficients, (n_b, T).
        diagonal: D, by name; parameters absent count as 0.
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
        memory_budget: bytes for gradients, layer IO and graphs.
        chunk_size: at most this many rows per pass; None chooses by tokens and memory.
        apply_b: policy whose derivatives ``batch_b`` takes, None for ``apply``.

    Returns:
        K, (n_a, n_b), at least float32.
    """
    apply_b = apply if apply_b is None else apply_b
    if len(batch_a.input_ids) < len(batch_b.input_ids):
        options = temperature, memory_budget, chunk_size
        return gradient_gram(params, batch_b, batch_a, diagonal, apply_b, *options, apply_b=apply).T
    params = detached(params)
    trained = {name: p for name, p in params.items() if name in diagonal}
    source = row_gradient_source(params, trained, batch_b, apply, temperature)
    per_token = max(1, layer_io_bytes_per_token(params, batch_b, apply, source.supported))
    shape = len(batch_a.input_ids), len(batch_b.input_ids)
    total = torch.zeros(shape, dtype=torch.float64, device=batch_a.input_ids.device)
    block_budget = memory_budget * 2 // 3
    for group in _groups(trained, block_budget):
        block_rows = min(shape[1], max(1, block_budget // _row_bytes(trained, group)))
        stream_budget = memory_budget - block_rows * _row_bytes(trained, group)
        stream_a = _Stream(source, group, per_token, stream_budget, chunk_size)
        stream_b = stream_a._replace(source=source._replace(apply=apply_b))
        for start in range(0, shape[1], block_rows):
            block = select_rows(batch_b, slice(start, start + block_rows))
            index_b, weighted = _weighted_gradients(
                stream_b.chunks(block), len(block.input_ids), trained, group, diagonal
            )
            for index_a, write in stream_a.chunks(batch_a):
                products = _inner_products(write, len(index_a), weighted, trained, group, stream_budget // 4)
                total[index_a.unsqueeze(1), start + index_b] += products
            # Released before the next block is made, so that two never exist at once.
            del weighted
    return total.to(promote(next(iter(params.values())).dtype))


class _Stream(NamedTuple):
    """Rows' gradients of one group of parameters, a chunk of rows at a time.

    ``per_token``: bytes of layer IO per token. ``budget``: bytes for layer IO, graphs and gradients of a chunk.
    """

    source: RowGradientSource
    group: Slices
    per_token: int
    budget: int
    chunk_size: int | None

    def chunks(self, batch: Batch) -> Iterator[tuple[Tensor, RowGradientWriter]]:
        """Yield the rows of a batch by index (b,), with the writer of their gradients."""
        others = {name: self.source.params[name] for name in self.group if name not in self.source.supported}
        max_rows = min(self.chunk_size or len(batch.input_ids), _max_rows(self.budget // 2, others))
        # A graph takes two to three times as much as the inputs and outputs of the linear maps that it holds.
        wanted = TOKENS_PER_CHUNK if self.chunk_size is None else self.chunk_size * batch.input_ids.shape[1]
        tokens = min(wanted, int(self.budget / (4.5 * self.per_token)))
        left_alignable = split_policy(self.source.apply).left_alignable
        for micro_batch in micro_batches(batch, None, left_alignable, tokens, max_rows):
            yield micro_batch.row_index, self.source.writer(batch, micro_batch, self.group)


def _groups(trained: Params, budget: int) -> Iterator[Slices]:
    """Yield all parameters at once where the gradient of a row fits the budget, else groups of slices that do."""
    group: Slices = {}
    used = 0
    for name, p in trained.items():
        entry_bytes = p.numel() // max(1, first_axis_length(p)) * promote(p.dtype).itemsize
        start = 0
        while start < first_axis_length(p):
            step = min(first_axis_length(p) - start, max(1, (budget - used) // max(1, entry_bytes)))
            if group and (used + step * entry_bytes > budget or name in group):
                yield group
                group, used = {}, 0
                continue
            group[name] = slice(start, start + step)
            start, used = start + step, used + step * entry_bytes
    if group:
        yield group


def _max_rows(budget: int, params: Params) -> int:
    """Return the number of rows, at least 1, whose gradients fit the budget."""
    return max(1, budget // max(1, sum(p.numel() * promote(p.dtype).itemsize for p in params.values())))


def _row_bytes(trained: Params, group: Slices) -> int:
    """Return the bytes of one row's gradient of a group."""
    return sum(
        _numel(trained[name], entries) * promote(trained[name].dtype).itemsize for name, entries in group.items()
    )


def _numel(p: Tensor, entries: slice) -> int:
    return p.numel() // first_axis_length(p) * (entries.stop - entries.start)


def _weighted_gradients(
    chunks: Iterable[tuple[Tensor, RowGradientWriter]], rows: int, trained: Params, group: Slices, diagonal: Params
) -> tuple[Tensor, Params]:
    """Return the index of all rows in the order of the chunks, and D g_i of each, (rows, n) by name."""
    out = {
        name: trained[name].new_empty(rows, _numel(trained[name], entries), dtype=promote(trained[name].dtype))
        for name, entries in group.items()
    }
    order: list[Tensor] = []
    start = 0
    for index, write in chunks:
        for name, entries in group.items():
            grads = out[name][start : start + len(index)]
            write(name, entries, grads)
            length = first_axis_length(trained[name])
            grads.mul_(diagonal[name].to(grads.dtype).reshape(length, -1)[entries].flatten())
        order.append(index)
        start += len(index)
    return torch.cat(order), out


def _inner_products(
    write: RowGradientWriter, rows: int, weighted: Params, trained: Params, group: Slices, budget: int
) -> Tensor:
    """Return the inner products of a chunk's gradients with a block of weighted ones.

    Args:
        write: writer of the chunk's gradients.
        rows: number of rows n_a of the chunk.
        weighted: D g_i of the block's n_b rows, (n_b, n) by name.
        trained: the parameters, by name.
        group: the entries of each that ``weighted`` covers.
        budget: bytes for the chunk's gradients, of which a slice of entries is formed at a time.

    Returns:
        (n_a, n_b), float64.
    """
    total: Tensor | None = None
    scratch: Tensor | None = None
    for name, right in weighted.items():
        covered = group[name]
        inner = trained[name].numel() // first_axis_length(trained[name])
        step = min(covered.stop - covered.start, max(1, budget // (rows * inner * right.element_size())))
        if scratch is None or len(scratch) < rows * step * inner or scratch.dtype != right.dtype:
            scratch = right.new_empty(rows * step * inner)
        for start in range(covered.start, covered.stop, step):
            entries = slice(start, min(start + step, covered.stop))
            columns = slice((entries.start - covered.start) * inner, (entries.stop - covered.start) * inner)
            left = scratch[: rows * (columns.stop - columns.start)].view(rows, -1)
            write(name, entries, left)
            product = thin_matmul(left, right[:, columns]).double()
            total = product if total is None else total + product
    assert total is not None
    return total
