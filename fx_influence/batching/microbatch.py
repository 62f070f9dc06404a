"""A batch in parts that go through the model together, without the tokens on which no score depends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.batching.packed_layout import PackedLayout
from fx_influence.types import Batch

TOKENS_PER_CHUNK = 2048
"""Rows are taken together up to this many tokens where the caller names no ``chunk_size``."""


class MicroBatch(NamedTuple):
    """Rows of a batch as the model reads them, and where its features score a completion token.

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


def micro_batches(
    batch: Batch,
    chunk_size: int | None,
    left_alignable: bool,
    tokens: int = TOKENS_PER_CHUNK,
    at_most: int | None = None,
) -> list[MicroBatch]:
    """The rows of a batch, ``chunk_size`` at a time, or as many as fit ``tokens``, ``at_most`` so many.

    ``left_alignable``: see ``policy.SplitPolicy``. Then rows are sorted by length, moved to begin in column 0 and cut
    where the longest row of their part ends, the last completion token itself left out, since it is scored and scores
    nothing. Nothing attends to what pads the shorter rows, so it is not masked either, and fused kernels need no mask.

    Example:
        >>> ids = torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 8, 0]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False] * 3 + [True] * 2, [False, True, True, True, False]]))
        >>> [part] = micro_batches(batch, None, left_alignable=True)
        >>> part.input_ids.tolist(), part.row_index.tolist(), part.targets.tolist(), part.position.tolist()
        ([[5, 6, 7], [5, 6, 7]], [1, 0], [6, 7, 8, 6, 7], [0, 1, 2, 0, 1])
    """
    count, width = batch.input_ids.shape
    device = batch.input_ids.device
    columns = torch.arange(width, device=device)
    if not left_alignable:
        lengths, begin, order = [width] * count, torch.zeros(count, dtype=torch.long, device=device), None
    else:
        begin = torch.where(batch.attention_mask, columns, width).amin(1).clamp(max=width - 1)
        end = torch.where(batch.completion_mask, columns, 0).amax(1)
        sizes, order = (end - begin).clamp(min=1).sort(descending=True, stable=True)
        lengths = sizes.tolist()
    found, start = [], 0
    while start < count:
        length = max(lengths[start], 1)
        stop = min(count, start + (chunk_size or max(1, min(tokens // length, at_most or count))))
        index = torch.arange(start, stop, device=device) if order is None else order[start:stop]
        found.append(_part(batch, index, begin[index], columns[:length], left_alignable))
        start = stop
    return found


def _part(batch: Batch, index: Tensor, begin: Tensor, columns: Tensor, left_alignable: bool) -> MicroBatch:
    width = batch.input_ids.shape[1]
    at = begin.unsqueeze(1) + columns
    inside = at.clamp(max=width - 1)
    ids, attention = (field[index].gather(1, inside) for field in batch[:2])
    following = (at + 1).clamp(max=width - 1)
    scored = batch.completion_mask[index].gather(1, following) & (at + 1 < width)
    if left_alignable:
        # After a row's last attended token nothing attends; gaps before it stay gaps.
        last = torch.where(batch.attention_mask[index], torch.arange(width, device=at.device), -1).amax(1, keepdim=True)
        attention = attention | (at > last)
    row, column = scored.nonzero(as_tuple=True)
    position = following[row, column]
    place = index[row] * width + position
    return MicroBatch(index, ids, attention, row, column, batch.input_ids.flatten()[place], place)
