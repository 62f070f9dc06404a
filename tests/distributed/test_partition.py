"""Partition of rows over ranks: every row once, equal counts, rollouts of one prompt together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from fx_influence.distributed.partition import RowPartition, partition_blocks, partition_rows
from fx_influence.types import Batch


def partition_of(lengths: list[int], prompts: list[int] | None, ranks: int) -> RowPartition:
    attention = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    mesh: Any = SimpleNamespace(size=lambda: ranks)
    batch = Batch(attention.long(), attention, attention)
    return partition_rows(batch, mesh, None if prompts is None else torch.tensor(prompts))


@given(
    rows=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=20),
    ranks=st.integers(1, 6),
    by_prompt=st.booleans(),
)
def test_partition_rows_assigns_every_row_once(rows: list[tuple[int, int]], ranks: int, by_prompt: bool) -> None:
    lengths, prompts = ([row[k] for row in rows] for k in range(2))
    partition = partition_of(lengths, prompts if by_prompt else None, ranks)
    assert partition.table.shape == partition.first.shape == (ranks, -(-len(rows) // ranks))
    assert sorted(partition.table[partition.first].tolist()) == list(range(len(rows)))


def test_partition_rows_keeps_prompts_on_one_rank() -> None:
    prompts = [k // 4 for k in range(24)]
    partition = partition_of([3 + k // 4 for k in range(24)], prompts, 3)
    prompts_by_rank = [sorted({prompts[k] for k in rows}) for rows in partition.table.tolist()]
    # The longest prompt first, each to the rank that has the fewest tokens so far.
    assert prompts_by_rank == [[0, 5], [1, 4], [2, 3]]
    by_length = partition_of([3 + k // 4 for k in range(24)], None, 3)
    assert all(len({prompts[k] for k in rows}) > 2 for rows in by_length.table.tolist())


@given(n_a=st.integers(1, 12), n_b=st.integers(1, 12), ranks=st.integers(1, 8))
def test_partition_blocks_covers_the_matrix(n_a: int, n_b: int, ranks: int) -> None:
    partition = partition_blocks(n_a, n_b, ranks, torch.device("cpu"))
    assert len(partition.rows) * len(partition.columns) == ranks
    covered = torch.zeros(n_a, n_b, dtype=torch.bool)
    for rank in range(ranks):
        rows, columns = partition.of_rank(rank)
        covered[rows.unsqueeze(1), columns] = True
    assert covered.all()
