"""Parts of a batch: every completion token is scored once, by the features before it, whatever is left out."""

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
    """Rows with padding on both sides, gaps in either mask, no completion, or nothing attended at all."""
    rows, width = draw(st.integers(1, 6)), draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    begin = torch.randint(0, width, (rows, 1), generator=generator)
    end = begin + torch.randint(0, width + 1, (rows, 1), generator=generator)
    at = torch.arange(width)
    attention = (at >= begin) & (at < end) & (torch.rand(rows, width, generator=generator) < 0.9)
    # what scores a token is attended to, as check_batch asks
    scorable = attention & attention.roll(1, 1) & (at > 0)
    completion = scorable & (torch.rand(rows, width, generator=generator) < 0.6)
    return Batch(torch.randint(1, 50, (rows, width), generator=generator), attention, completion)


chunks = st.sampled_from([None, 1, 2, 5])


@given(batch=batches(), chunk=chunks, left_alignable=st.booleans())
def test_micro_batches_score_each_token_once(batch: Batch, chunk: int | None, left_alignable: bool) -> None:
    found = micro_batches(batch, chunk, left_alignable)
    assert sorted(torch.cat([part.row_index for part in found]).tolist()) == list(range(len(batch.input_ids)))
    place = torch.cat([part.flat_index for part in found])
    assert sorted(place.tolist()) == batch.completion_mask.flatten().nonzero().flatten().tolist()
    width = batch.input_ids.shape[1]
    for part in found:
        assert torch.equal(part.targets, batch.input_ids.flatten()[part.flat_index])
        row, position = part.flat_index // width, part.flat_index % width
        assert torch.equal(part.row_index[part.row], row)
        assert torch.equal(part.input_ids[part.row, part.position], batch.input_ids[row, position - 1])
        assert torch.equal(part.row, part.row.sort().values), "row by row"


@given(batch=batches(), chunk=chunks)
def test_micro_batches_preserve_attended_tokens_when_aligned(batch: Batch, chunk: int | None) -> None:
    width = batch.input_ids.shape[1]
    for part in micro_batches(batch, chunk, left_alignable=True):
        for row, column, place in zip(part.row.tolist(), part.position.tolist(), part.flat_index.tolist(), strict=True):
            i, before = place // width, place % width - 1
            seen = attended(part.input_ids[row], part.attention_mask[row], column)
            assert seen == attended(batch.input_ids[i], batch.attention_mask[i], before)


def attended(ids: Tensor, mask: Tensor, last: int) -> list[tuple[int, int]]:
    """Token and distance of all that is attended to from ``last`` on backwards."""
    return [(int(ids[k]), last - k) for k in range(last, -1, -1) if mask[k]]


def test_micro_batches_drop_padding_when_aligned() -> None:
    lengths = torch.tensor([[2], [30], [3], [31]])
    at = torch.arange(40)
    attention = (at >= 5) & (at < 5 + lengths)
    batch = Batch(torch.ones(4, 40, dtype=torch.long), attention, attention & (at > 5))
    found = micro_batches(batch, 2, left_alignable=True)
    # A row's last token is scored and scores nothing.
    assert [tuple(part.input_ids.shape) for part in found] == [(2, 30), (2, 2)]
    assert [part.row_index.tolist() for part in found] == [[3, 1], [2, 0]]
    assert all(part.attention_mask.all() for part in found), "what pads the end is seen by nothing"
    assert [tuple(part.input_ids.shape) for part in micro_batches(batch, 2, left_alignable=False)] == [(2, 40)] * 2


@pytest.mark.parametrize(("tokens", "at_most", "sizes"), [(64, None, [2, 2]), (64, 1, [1] * 4), (1, None, [1] * 4)])
def test_micro_batches_respect_token_and_row_limits(tokens: int, at_most: int | None, sizes: list[int]) -> None:
    ids = torch.ones(4, 32, dtype=torch.long)
    batch = Batch(ids, ids > 0, (ids > 0) & (torch.arange(32) > 20))
    assert [len(part.row_index) for part in micro_batches(batch, None, False, tokens, at_most)] == sizes


def test_distinct_rows_and_row_chunks_keep_order() -> None:
    ids = torch.tensor([[1, 2], [1, 3], [1, 2]])
    batch = Batch(ids, ids > 0, ids > 1, group=torch.arange(3))
    once, index = distinct_rows(batch)
    assert torch.equal(once.input_ids[index], ids)
    assert len(once.input_ids) == 2
    assert [part.group.tolist() for part in row_chunks(batch, 2) if part.group is not None] == [[0, 1], [2]]
