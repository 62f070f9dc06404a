"""Micro-batches: every completion token is scored once, by the hidden state before it, whatever is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fx_influence.batching.microbatch import micro_batches
from fx_influence.batching.rows import distinct_rows, row_chunks
from fx_influence.types import Batch


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Draw rows with padding on both sides, gaps in either mask, no completion, or no attended token at all."""
    rows, width = draw(st.integers(1, 6)), draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    begin = torch.randint(0, width, (rows, 1), generator=generator)
    end = begin + torch.randint(0, width + 1, (rows, 1), generator=generator)
    columns = torch.arange(width)
    attention = (columns >= begin) & (columns < end) & (torch.rand(rows, width, generator=generator) < 0.9)
    # The token before a completion token is attended to, as check_batch requires.
    scorable = attention & attention.roll(1, 1) & (columns > 0)
    completion = scorable & (torch.rand(rows, width, generator=generator) < 0.6)
    return Batch(torch.randint(1, 50, (rows, width), generator=generator), attention, completion)


chunk_sizes = st.sampled_from([None, 1, 2, 5])


@given(batch=batches(), chunk=chunk_sizes, left_alignable=st.booleans())
def test_micro_batches_score_each_token_once(batch: Batch, chunk: int | None, left_alignable: bool) -> None:
    chunks = micro_batches(batch, chunk, left_alignable)
    assert sorted(torch.cat([micro_batch.row_index for micro_batch in chunks]).tolist()) == list(
        range(len(batch.input_ids))
    )
    flat_index = torch.cat([micro_batch.flat_index for micro_batch in chunks])
    assert sorted(flat_index.tolist()) == batch.completion_mask.flatten().nonzero().flatten().tolist()
    width = batch.input_ids.shape[1]
    for micro_batch in chunks:
        assert torch.equal(micro_batch.targets, batch.input_ids.flatten()[micro_batch.flat_index])
        row, position = micro_batch.flat_index // width, micro_batch.flat_index % width
        assert torch.equal(micro_batch.row_index[micro_batch.row], row)
        assert torch.equal(
            micro_batch.input_ids[micro_batch.row, micro_batch.position], batch.input_ids[row, position - 1]
        )
        assert torch.equal(micro_batch.row, micro_batch.row.sort().values), "row by row"


@given(batch=batches(), chunk=chunk_sizes)
def test_micro_batches_preserve_attended_tokens_when_aligned(batch: Batch, chunk: int | None) -> None:
    width = batch.input_ids.shape[1]
    for micro_batch in micro_batches(batch, chunk, left_alignable=True):
        for row, column, flat_index in zip(
            micro_batch.row.tolist(), micro_batch.position.tolist(), micro_batch.flat_index.tolist(), strict=True
        ):
            i, before = flat_index // width, flat_index % width - 1
            seen = attended(micro_batch.input_ids[row], micro_batch.attention_mask[row], column)
            assert seen == attended(batch.input_ids[i], batch.attention_mask[i], before)


def attended(ids: Tensor, mask: Tensor, last: int) -> list[tuple[int, int]]:
    """Return token and distance of all attended tokens from ``last`` on backwards."""
    return [(int(ids[k]), last - k) for k in range(last, -1, -1) if mask[k]]


def test_micro_batches_drop_padding_when_aligned() -> None:
    lengths = torch.tensor([[2], [30], [3], [31]])
    columns = torch.arange(40)
    attention = (columns >= 5) & (columns < 5 + lengths)
    batch = Batch(torch.ones(4, 40, dtype=torch.long), attention, attention & (columns > 5))
    chunks = micro_batches(batch, 2, left_alignable=True)
    # A row's last token is scored and scores nothing.
    assert [tuple(micro_batch.input_ids.shape) for micro_batch in chunks] == [(2, 30), (2, 2)]
    assert [micro_batch.row_index.tolist() for micro_batch in chunks] == [[3, 1], [2, 0]]
    assert all(micro_batch.attention_mask.all() for micro_batch in chunks), "nothing attends to padding at the end"
    assert [tuple(micro_batch.input_ids.shape) for micro_batch in micro_batches(batch, 2, left_alignable=False)] == [
        (2, 40)
    ] * 2


@pytest.mark.parametrize(
    ("max_tokens", "max_rows", "sizes"), [(64, None, [2, 2]), (64, 1, [1] * 4), (1, None, [1] * 4)]
)
def test_micro_batches_respect_token_and_row_limits(max_tokens: int, max_rows: int | None, sizes: list[int]) -> None:
    ids = torch.ones(4, 32, dtype=torch.long)
    batch = Batch(ids, ids > 0, (ids > 0) & (torch.arange(32) > 20))
    assert [
        len(micro_batch.row_index) for micro_batch in micro_batches(batch, None, False, max_tokens, max_rows)
    ] == sizes


def test_distinct_rows_and_row_chunks_keep_order() -> None:
    ids = torch.tensor([[1, 2], [1, 3], [1, 2]])
    batch = Batch(ids, ids > 0, ids > 1, group=torch.arange(3))
    once, index = distinct_rows(batch)
    assert torch.equal(once.input_ids[index], ids)
    assert len(once.input_ids) == 2
    assert [micro_batch.group.tolist() for micro_batch in row_chunks(batch, 2) if micro_batch.group is not None] == [
        [0, 1],
        [2],
    ]
