"""A batch in parts that hold each prompt once, however many rows begin with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.batching.microbatch import TOKENS_PER_CHUNK, MicroBatch
from fx_influence.batching.packed_layout import LengthBucket, PackedLayout
from fx_influence.batching.prompts import _bounds, _numbers
from fx_influence.types import Batch

MAX_TOKEN_FRACTION = 0.9
"""The part of all tokens that may be left for sharing to be worth what it takes to part attention by rows."""

MIN_LENGTH_RATIO, MIN_BUCKET = 0.75, 8
"""Sequences attend together while each is at least that part of the longest, and where they are too few otherwise."""


class _Rows(NamedTuple):
    """Of every row: where its prompt begins, where its completion does, how many tokens of that go in; its prompt."""

    begin: Tensor
    first: Tensor
    own: Tensor
    prompt: Tensor


def shared_prompt_index(batch: Batch) -> Tensor | None:
    """For every row the number of its prompt, (B,), None where one part of all rows would not be worth sharing them.

    Example:
        >>> ids = torch.tensor([[7, 8, 1, 2], [7, 9, 1, 2], [7, 8, 3, 4], [7, 8, 5, 6]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, False, True, True]] * 4))
        >>> shared_prompt_index(batch).tolist(), shared_prompt_index(Batch(*(x[:2] for x in batch[:3])))
        ([0, 1, 0, 0], None)
    """
    found = _rows_of(batch)
    if found is None:
        return None
    sizes = found.first - found.begin
    once = torch.zeros_like(sizes).index_copy(0, found.prompt, sizes).sum() + found.own.sum()
    return found.prompt if once <= MAX_TOKEN_FRACTION * (sizes + found.own).sum() else None


def packed_micro_batches(
    batch: Batch, chunk_size: int | None, tokens: int = TOKENS_PER_CHUNK
) -> list[MicroBatch] | None:
    """As ``micro_batches.parts`` of aligned rows, those with the same prompt together and its tokens there once.

    A part is one row of N tokens, with the ``layout`` by which its sequences attend. None where fewer than a tenth of
    the tokens are saved, and for rows with gaps between attended tokens or without a completion.

    Example:
        >>> ids = torch.tensor([[7, 8, 1, 2], [7, 8, 3, 4]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, False, True, True]] * 2))
        >>> [part] = packed_micro_batches(batch, None)
        >>> part.input_ids.tolist(), part.targets.tolist(), part.position.tolist()
        ([[7, 8, 1, 3]], [1, 2, 3, 4], [1, 2, 1, 3])
        >>> part.layout.position_ids.tolist(), part.layout.buckets[0].keys.tolist()
        ([[0, 1, 2, 2]], [[0, 1, 2], [0, 1, 2], [0, 1, 3]])
    """
    found = _rows_of(batch)
    if found is None:
        return None
    sizes, own, prompt = (x.tolist() for x in (found.first - found.begin, found.own, found.prompt))
    longest: dict[int, int] = {}
    for k, number in enumerate(prompt):
        longest[number] = max(longest.get(number, 0), sizes[k] + own[k])
    order = sorted(range(len(own)), key=lambda k: (-longest[prompt[k]], prompt[k], -own[k]))
    chosen: list[list[int]] = []
    here: set[int] = set()
    used = total = 0
    for k in order:
        size = own[k] + (0 if prompt[k] in here else sizes[k])
        if not chosen or len(chosen[-1]) == chunk_size or (chunk_size is None and used + size > tokens):
            chosen.append([])
            here, used, size = set(), 0, own[k] + sizes[k]
        chosen[-1].append(k)
        here.add(prompt[k])
        used += size
        total += size
    if total > MAX_TOKEN_FRACTION * (sum(own) + sum(sizes)):
        return None
    return [_part(batch, found, torch.tensor(members, device=batch.input_ids.device)) for members in chosen]


def _rows_of(batch: Batch) -> _Rows | None:
    width = batch.input_ids.shape[1]
    columns = torch.arange(width, device=batch.input_ids.device)
    begin, first = _bounds(batch)
    end = torch.where(batch.completion_mask, columns, 0).amax(1)
    inside = (columns >= begin.unsqueeze(1)) & (columns <= end.unsqueeze(1))
    if not bool(((first > begin) & (first < width)).all() & (batch.attention_mask | ~inside).all()):
        return None
    return _Rows(begin, first, end - first, _numbers(batch, begin, first))


def _alike(lengths: Tensor) -> Iterator[Tensor]:
    """Sequences by length, so many together that little of what they are padded to is padding; none without tokens."""
    sizes, order = lengths.sort(descending=True)
    first = 0
    for k, size in enumerate(found := sizes.tolist()):
        if size == 0 or (k - first >= MIN_BUCKET and size < MIN_LENGTH_RATIO * found[first]):
            yield order[first:k]
            first = k
        if size == 0:
            return
    yield order[first:]


def _part(batch: Batch, rows: _Rows, members: Tensor) -> MicroBatch:
    width = batch.input_ids.shape[1]
    begin, first, own, prompt = (x[members] for x in rows)
    numbers, prompt = torch.unique(prompt, return_inverse=True)
    # any of the rows that have it
    holder = torch.zeros_like(numbers).index_copy(0, prompt, torch.arange(len(members), device=members.device))
    before = first - begin
    lengths = torch.cat([before[holder], own])
    starts = lengths.cumsum(0) - lengths
    source = torch.cat([members[holder] * width + begin[holder], members * width + first])
    shared = torch.cat([torch.zeros_like(numbers), before])
    prefix = torch.cat([torch.zeros_like(numbers), starts[prompt]])

    sequence = torch.repeat_interleave(lengths)
    within = torch.arange(len(sequence), device=members.device) - starts[sequence]
    ids = batch.input_ids.flatten()[source[sequence] + within].unsqueeze(0)

    blocks, back, behind = [], torch.empty_like(sequence), 0
    for some in _alike(lengths):
        start, before, length = starts[some, None], shared[some, None], lengths[some, None]
        i, j = (torch.arange(int(n.max()), device=members.device) for n in (length, before + length))
        keys = torch.where(j < before, prefix[some, None] + j, start + j - before)
        queries = start + i
        blocks.append(
            LengthBucket(
                queries.clamp(max=len(sequence) - 1),
                keys.clamp(max=len(sequence) - 1),
                (j <= before.unsqueeze(-1) + i.unsqueeze(-1)).unsqueeze(1),
            )
        )
        real = i < length
        back[queries[real]] = behind + real.flatten().nonzero().squeeze(-1)
        behind += real.numel()
    layout = PackedLayout((shared[sequence] + within).unsqueeze(0), blocks, back)

    row, position = batch.completion_mask[members].nonzero(as_tuple=True)
    prompt_end, own_start = (starts + lengths - 1)[prompt], starts[len(numbers) :]
    column = torch.where(position == first[row], prompt_end[row], own_start[row] + position - 1 - first[row])
    place = members[row] * width + position
    return MicroBatch(
        members,
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        torch.zeros_like(column),
        column,
        batch.input_ids.flatten()[place],
        place,
        layout,
    )
