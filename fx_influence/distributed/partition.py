"""Assignment of a batch's rows, and of the blocks of a matrix, to the ranks of a device mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from fx_influence.batching.rows import select_rows
from fx_influence.distributed.collectives import all_gather, mesh_rank
from fx_influence.types import Batch, TokenStatistics

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class RowPartition(NamedTuple):
    """Assignment of rows to ranks, padded with repeated rows to equal counts.

    ``table``: (ranks, m), the rows by rank. ``first``: bool (ranks, m), False for a repeated row.
    """

    mesh: DeviceMesh
    table: Tensor
    first: Tensor

    def local_rows(self, batch: Batch) -> Batch:
        """Return this rank's rows; the coefficients of a repeated row are 0, so that no sum counts it twice."""
        rank = mesh_rank(self.mesh)
        local, first = select_rows(batch, self.table[rank]), self.first[rank].unsqueeze(1)
        c, b = (
            None if w is None else torch.where(first, w, 0.0) for w in (local.coefficients, local.entropy_coefficients)
        )
        return local._replace(coefficients=c, entropy_coefficients=b)

    def local_index(self, index: Tensor) -> Tensor:
        """Return which of this rank's rows are among the rows ``index`` of the batch."""
        return torch.isin(self.table[mesh_rank(self.mesh)], index).nonzero().squeeze(-1)

    def gather_rows(self, local: Tensor, axis: int = 0) -> Tensor:
        """Return the ranks' results for their rows, which lie along ``axis``, in the order of the batch."""
        by_row = rearrange(all_gather(self.mesh, local.movedim(axis, 0)), "rank row ... -> (rank row) ...")
        out = by_row.new_empty(int(self.first.sum()), *by_row.shape[1:])
        out[self.table[self.first]] = by_row[self.first.flatten()]
        return out.movedim(0, axis)

    def gather_values(self, local: TokenStatistics) -> TokenStatistics:
        """Return the token values or moments (..., B, T) of all rows from those of each rank's rows."""
        return type(local)(*(self.gather_rows(x, axis=-2) for x in local))


def partition_rows(batch: Batch, mesh: DeviceMesh, prompts: Tensor | None) -> RowPartition:
    """Return an assignment of rows to ranks with equal counts and about the same numbers of tokens.

    Args:
        batch: rollouts (B, T), the same on every rank.
        mesh: the ranks.
        prompts: prompt index per row (B,), by which rows of one prompt go to one rank as far as the counts allow; None
            assigns rows by length in turn.
    """
    count, ranks = len(batch.input_ids), mesh.size()
    lengths = batch.attention_mask.sum(-1).tolist()
    order = sorted(range(count), key=lambda k: -lengths[k])
    per_rank, device = -(-count // ranks), batch.input_ids.device
    if prompts is None:
        rows_by_rank = [order[rank::ranks] for rank in range(ranks)]
    else:
        rows_by_rank = _by_prompt(order, lengths, prompts.tolist(), ranks)
    # Padded with the shortest row, which costs least a second time.
    table = torch.tensor([rows + order[-1:] * (per_rank - len(rows)) for rows in rows_by_rank], device=device)
    sizes = torch.tensor([[len(rows)] for rows in rows_by_rank], device=device)
    return RowPartition(mesh, table, torch.arange(per_rank, device=device) < sizes)


def _by_prompt(order: list[int], lengths: list[int], prompts: list[int], ranks: int) -> list[list[int]]:
    """Return the rows by rank: rows of one prompt go to the rank with the fewest tokens, until that is full.

    Args:
        order: the rows, longest first.
        lengths: tokens of each row.
        prompts: prompt index of each row.
        ranks: number of ranks.
    """
    per_rank = -(-len(order) // ranks)
    rows_by_prompt: dict[int, list[int]] = {}
    for k in order:
        rows_by_prompt.setdefault(prompts[k], []).append(k)
    rows_by_rank: list[list[int]] = [[] for _ in range(ranks)]
    for remaining in rows_by_prompt.values():
        while remaining:
            open_ranks = (rows for rows in rows_by_rank if len(rows) < per_rank)
            emptiest = min(open_ranks, key=lambda rows: sum(lengths[k] for k in rows))
            capacity = per_rank - len(emptiest)
            emptiest += remaining[:capacity]
            remaining = remaining[capacity:]
    return rows_by_rank


class BlockPartition(NamedTuple):
    """Assignment of the blocks of a matrix (n_a, n_b) to ranks, one block each, by rows of the grid of blocks.

    ``rows``: (blocks down, m), the matrix rows of each block. ``columns``: (blocks across, m'), likewise. Both repeat
    their last index to equal counts.
    """

    rows: Tensor
    columns: Tensor

    def of_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the rows (m,) and columns (m',) of a rank's block."""
        return self.rows[rank // len(self.columns)], self.columns[rank % len(self.columns)]


def partition_blocks(n_a: int, n_b: int, ranks: int, device: torch.device) -> BlockPartition:
    """Return the assignment in which each rank's block has as few rows and columns together as possible.

    Args:
        n_a: rows of the matrix.
        n_b: columns of the matrix.
        ranks: number of ranks, and of blocks.
        device: device of the index.
    """
    divisors = (d for d in range(1, ranks + 1) if ranks % d == 0)
    down = min(divisors, key=lambda d: -(-n_a // d) + -(-n_b * d // ranks))
    return BlockPartition(_cut(n_a, down, device), _cut(n_b, ranks // down, device))


def _cut(count: int, blocks: int, device: torch.device) -> Tensor:
    """Return the index of ``count`` rows in equal blocks, (blocks, m), padded with the last row."""
    per_block = -(-count // blocks)
    index = torch.arange(per_block * blocks, device=device).clamp(max=count - 1)
    return rearrange(index, "(block row) -> block row", block=blocks)
