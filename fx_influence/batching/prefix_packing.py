"""Prefix packing: micro-batches that hold each prompt once, however many rows begin with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.batching.microbatch import TOKENS_PER_CHUNK, MicroBatch
from fx_influence.batching.packed_layout import LengthBucket, PackedLayout
from fx_influence.batching.prompts import prompt_bounds, prompt_index
from fx_influence.types import Batch

MAX_TOKEN_FRACTION = 0.9
"""Largest share of the tokens that packing may leave: above it, attention by sequence costs more than is saved."""

MIN_LENGTH_RATIO, MIN_BUCKET = 0.75, 8
"""A length bucket takes sequences of at least this share of its longest; and shorter ones until it has this many."""


class _RowGeometry(NamedTuple):
    """Columns and lengths of the rows of a batch, each (B,).

    ``begin``: column of the first prompt token. ``first``: column of the first completion token. ``inputs``: number of
    completion tokens that the model reads, all but the last. ``prompt``: index of the prompt.
    """

    begin: Tensor
    first: Tensor
    inputs: Tensor
    prompt: Tensor


def shared_prompt_index(batch: Batch) -> Tensor | None:
    """Return the index of every row's prompt, (B,), or None if one micro-batch of all rows is not worth packing.

    Example:
        >>> ids = torch.tensor([[7, 8, 1, 2], [7, 9, 1, 2], [7, 8, 3, 4], [7, 8, 5, 6]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, False, True, True]] * 4))
        >>> shared_prompt_index(batch).tolist(), shared_prompt_index(Batch(*(x[:2] for x in batch[:3])))
        ([0, 1, 0, 0], None)
    """
    rows = _row_geometry(batch)
    if rows is None:
        return None
    prompt_lengths = rows.first - rows.begin
    packed = torch.zeros_like(prompt_lengths).index_copy(0, rows.prompt, prompt_lengths).sum() + rows.inputs.sum()
    return rows.prompt if packed <= MAX_TOKEN_FRACTION * (prompt_lengths + rows.inputs).sum() else None


def packed_micro_batches(
    batch: Batch, chunk_size: int | None, max_tokens: int = TOKENS_PER_CHUNK
) -> list[MicroBatch] | None:
    """Cut a batch into micro-batches of one packed row each, in which rows with the same prompt share its tokens.

    Args:
        batch: (B, T), of a left-alignable policy.
        chunk_size: rows of the batch per micro-batch; None fits as many as ``max_tokens`` allows.
        max_tokens: tokens N of a packed row where ``chunk_size`` is None.

    Returns:
        Micro-batches of one row of N tokens, with the ``layout`` by which its sequences attend. None if fewer than a
        tenth of the tokens are saved, and for rows with gaps between attended tokens or without a completion.

    Example:
        >>> ids = torch.tensor([[7, 8, 1, 2], [7, 8, 3, 4]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, False, True, True]] * 2))
        >>> [micro_batch] = packed_micro_batches(batch, None)
        >>> micro_batch.input_ids.tolist(), micro_batch.targets.tolist(), micro_batch.position.tolist()
        ([[7, 8, 1, 3]], [1, 2, 3, 4], [1, 2, 1, 3])
        >>> micro_batch.layout.position_ids.tolist(), micro_batch.layout.buckets[0].keys.tolist()
        ([[0, 1, 2, 2]], [[0, 1, 2], [0, 1, 2], [0, 1, 3]])
    """
    rows = _row_geometry(batch)
    if rows is None:
        return None
    prompt_lengths, inputs, prompt = (x.tolist() for x in (rows.first - rows.begin, rows.inputs, rows.prompt))
    # Rows of one prompt are adjacent, those of the prompt with the longest row first.
    longest: dict[int, int] = {}
    for k, number in enumerate(prompt):
        longest[number] = max(longest.get(number, 0), prompt_lengths[k] + inputs[k])
    order = sorted(range(len(inputs)), key=lambda k: (-longest[prompt[k]], prompt[k], -inputs[k]))
    chunks: list[list[int]] = []
    packed_prompts: set[int] = set()
    used = total = 0
    for k in order:
        size = inputs[k] + (0 if prompt[k] in packed_prompts else prompt_lengths[k])
        if not chunks or len(chunks[-1]) == chunk_size or (chunk_size is None and used + size > max_tokens):
            chunks.append([])
            packed_prompts, used, size = set(), 0, inputs[k] + prompt_lengths[k]
        chunks[-1].append(k)
        packed_prompts.add(prompt[k])
        used += size
        total += size
    if total > MAX_TOKEN_FRACTION * (sum(inputs) + sum(prompt_lengths)):
        return None
    return [_packed_micro_batch(batch, rows, torch.tensor(chunk, device=batch.input_ids.device)) for chunk in chunks]


def _row_geometry(batch: Batch) -> _RowGeometry | None:
    """Return the geometry of all rows, or None if a row has a gap between attended tokens or no completion."""
    width = batch.input_ids.shape[1]
    columns = torch.arange(width, device=batch.input_ids.device)
    begin, first = prompt_bounds(batch)
    end = torch.where(batch.completion_mask, columns, 0).amax(1)
    inside = (columns >= begin.unsqueeze(1)) & (columns <= end.unsqueeze(1))
    if not bool(((first > begin) & (first < width)).all() & (batch.attention_mask | ~inside).all()):
        return None
    return _RowGeometry(begin, first, end - first, prompt_index(batch))


def _length_buckets(lengths: Tensor) -> Iterator[Tensor]:
    """Yield the indices of sequences of similar length, so that little of a bucket is padding; none without tokens."""
    sorted_lengths, order = lengths.sort(descending=True)
    first = 0
    for k, length in enumerate(descending := sorted_lengths.tolist()):
        if length == 0 or (k - first >= MIN_BUCKET and length < MIN_LENGTH_RATIO * descending[first]):
            yield order[first:k]
            first = k
        if length == 0:
            return
    yield order[first:]


def _packed_micro_batch(batch: Batch, rows: _RowGeometry, row_index: Tensor) -> MicroBatch:
    """Pack the rows ``row_index`` into one row: first every distinct prompt, then every completion."""
    width = batch.input_ids.shape[1]
    device = row_index.device
    begin, first, inputs, prompt = (x[row_index] for x in rows)
    prompts, prompt = torch.unique(prompt, return_inverse=True)
    # The tokens of a prompt are read from any one of the rows that have it.
    source_row = torch.zeros_like(prompts).index_copy(0, prompt, torch.arange(len(row_index), device=device))
    prompt_lengths = first - begin
    # The sequences: prompts, which share nothing, and completions, each with the prefix of its prompt.
    lengths = torch.cat([prompt_lengths[source_row], inputs])
    starts = lengths.cumsum(0) - lengths
    source = torch.cat([row_index[source_row] * width + begin[source_row], row_index * width + first])
    prefix_lengths = torch.cat([torch.zeros_like(prompts), prompt_lengths])
    prefix_starts = torch.cat([torch.zeros_like(prompts), starts[prompt]])

    sequence = torch.repeat_interleave(lengths)
    offset = torch.arange(len(sequence), device=device) - starts[sequence]
    ids = batch.input_ids.flatten()[source[sequence] + offset].unsqueeze(0)

    buckets, inverse_index, queries_before = [], torch.empty_like(sequence), 0
    for bucket in _length_buckets(lengths):
        start, prefix, length = starts[bucket, None], prefix_lengths[bucket, None], lengths[bucket, None]
        i, j = (torch.arange(int(n.max()), device=device) for n in (length, prefix + length))
        keys = torch.where(j < prefix, prefix_starts[bucket, None] + j, start + j - prefix)
        queries = start + i
        buckets.append(
            LengthBucket(
                queries.clamp(max=len(sequence) - 1),
                keys.clamp(max=len(sequence) - 1),
                (j <= prefix.unsqueeze(-1) + i.unsqueeze(-1)).unsqueeze(1),
            )
        )
        is_token = i < length
        inverse_index[queries[is_token]] = queries_before + is_token.flatten().nonzero().squeeze(-1)
        queries_before += is_token.numel()
    position_ids = (prefix_lengths[sequence] + offset).unsqueeze(0)
    layout = PackedLayout(position_ids, buckets, inverse_index, torch.cat([row_index[source_row], row_index])[sequence])

    row, column = batch.completion_mask[row_index].nonzero(as_tuple=True)
    prompt_end, completion_start = (starts + lengths - 1)[prompt], starts[len(prompts) :]
    # The first completion token is scored by the last token of its prompt.
    position = torch.where(column == first[row], prompt_end[row], completion_start[row] + column - 1 - first[row])
    flat_index = row_index[row] * width + column
    return MicroBatch(
        row_index,
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        torch.zeros_like(position),
        position,
        batch.input_ids.flatten()[flat_index],
        flat_index,
        layout,
    )
