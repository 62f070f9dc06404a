"""Micro-batches: rows that pass through the model in one call, without the tokens on which no score depends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.batching.packed_layout import PackedLayout
from fx_influence.types import Batch

TOKENS_PER_CHUNK = 2048
"""Number of tokens up to which rows share a micro-batch if the caller sets no ``chunk_size``."""


class MicroBatch(NamedTuple):
    """Rows of a batch as the model reads them, and the hidden states that score a completion token.

    ``row_index``: (b,), the rows of the batch. ``input_ids``, ``attention_mask``: (b, L). ``row``, ``position``: (n,),
    index into the hidden states (b, L) of the state that scores each completion token, row by row in order.
    ``targets``: (n,), the tokens scored. ``flat_index``: (n,), their positions in the batch as row * T + position.
    ``layout``: where rows share prompts, their tokens are packed into a single row, see ``PackedLayout``; else None.
    """

    row_index: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    position: Tensor
    targets: Tensor
    flat_index: Tensor
    layout: PackedLayout | None = None

    def of_rows(self, index: Tensor, batch: Batch) -> MicroBatch:
        """Return the micro-batch of ``select_rows(batch, index)`` as one of ``batch``."""
        width = batch.input_ids.shape[1]
        flat_index = index[self.flat_index // width] * width + self.flat_index % width
        layout = None if self.layout is None else self.layout._replace(token_row=index[self.layout.token_row])
        return self._replace(row_index=index[self.row_index], flat_index=flat_index, layout=layout)

    def token_rows(self) -> Tensor:
        """Return the row of the batch that each token of ``input_ids`` is read from, (b * L,)."""
        if self.layout is not None:
            return self.layout.token_row
        return self.row_index.repeat_interleave(self.input_ids.shape[1])


def micro_batches(
    batch: Batch,
    chunk_size: int | None,
    left_alignable: bool,
    max_tokens: int = TOKENS_PER_CHUNK,
    max_rows: int | None = None,
) -> list[MicroBatch]:
    """Cut a batch into micro-batches.

    Rows of a left-alignable policy are sorted by length, moved to begin in column 0 and cut where the longest row of
    their micro-batch ends. The last completion token is left out, since it is scored and scores nothing. Nothing
    attends to the padding after shorter rows, so it is not masked either, and fused kernels need no mask.

    Args:
        batch: (B, T).
        chunk_size: rows per micro-batch; None fits as many as ``max_tokens`` and ``max_rows`` allow.
        left_alignable: whether rows may be moved, see ``policy.SplitPolicy``.
        max_tokens: tokens per micro-batch, padding included, where ``chunk_size`` is None.
        max_rows: rows per micro-batch where ``chunk_size`` is None; None sets no limit.

    Example:
        >>> ids = torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 8, 0]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False] * 3 + [True] * 2, [False, True, True, True, False]]))
        >>> [micro_batch] = micro_batches(batch, None, left_alignable=True)
        >>> micro_batch.input_ids.tolist(), micro_batch.row_index.tolist()
        ([[5, 6, 7], [5, 6, 7]], [1, 0])
        >>> micro_batch.targets.tolist(), micro_batch.position.tolist()
        ([6, 7, 8, 6, 7], [0, 1, 2, 0, 1])
    """
    count, width = batch.input_ids.shape
    device = batch.input_ids.device
    columns = torch.arange(width, device=device)
    if not left_alignable:
        begin, order = torch.zeros(count, dtype=torch.long, device=device), torch.arange(count, device=device)
        sorted_lengths = torch.full_like(begin, width)
    else:
        begin = torch.where(batch.attention_mask, columns, width).amin(1).clamp(max=width - 1)
        end = torch.where(batch.completion_mask, columns, 0).amax(1)
        sorted_lengths, order = (end - begin).clamp(min=1).sort(descending=True, stable=True)
    # Read for all micro-batches at once, since the host waits for the device each time.
    lengths, scored = torch.stack([sorted_lengths, batch.completion_mask.sum(1)[order]]).tolist()
    row, column = batch.completion_mask[order].nonzero(as_tuple=True)
    chunks, start, first = [], 0, 0
    while start < count:
        length = max(lengths[start], 1)
        stop = min(count, start + (chunk_size or max(1, min(max_tokens // length, max_rows or count))))
        last = first + sum(scored[start:stop])
        index, tokens = order[start:stop], (row[first:last] - start, column[first:last])
        chunks.append(_micro_batch(batch, index, begin[index], columns[:length], tokens, left_alignable))
        start, first = stop, last
    return chunks


def _micro_batch(
    batch: Batch, index: Tensor, begin: Tensor, columns: Tensor, tokens: tuple[Tensor, Tensor], left_alignable: bool
) -> MicroBatch:
    """Return a micro-batch of some rows.

    Args:
        batch: (B, T).
        index: (b,), the rows.
        begin: (b,), the column that each begins at.
        columns: (L,), 0..L-1, as many as are taken of each.
        tokens: row of the micro-batch and column of the batch of every completion token, (n,) each, row by row.
        left_alignable: whether rows may be moved.
    """
    width = batch.input_ids.shape[1]
    source = begin.unsqueeze(1) + columns
    inside = source.clamp(max=width - 1)
    ids, attention = (field[index].gather(1, inside) for field in (batch.input_ids, batch.attention_mask))
    if left_alignable:
        # Nothing attends to tokens after a row's last attended one, so they need no mask; gaps before it need one.
        attended = torch.where(batch.attention_mask[index], torch.arange(width, device=source.device), -1)
        attention = attention | (source > attended.amax(1, keepdim=True))
    row, column = tokens
    flat_index = index[row] * width + column
    targets = batch.input_ids.flatten()[flat_index]
    return MicroBatch(index, ids, attention, row, column - 1 - begin[row], targets, flat_index)
