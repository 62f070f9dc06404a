"""Which rank takes which rows of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fx_influence.batching.rows import select_rows
from fx_influence.distributed.collectives import (
    all_gather,
    mesh_rank,
)
from fx_influence.types import Batch, TokenValues

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class RowPartition(NamedTuple):
    """Which rank takes which rows of a batch, each as many; where they do not go round some are taken a second time.

    ``table``: (ranks, m), the rows by rank. ``first``: bool (ranks, m), False for a row taken a second time.
    """

    mesh: DeviceMesh
    table: Tensor
    first: Tensor

    def own(self, batch: Batch) -> Batch:
        """This rank's rows; one taken a second time has no coefficients but 0, so that no sum counts it twice."""
        rank = mesh_rank(self.mesh)
        mine, once = select_rows(batch, self.table[rank]), self.first[rank].unsqueeze(1)
        c, b = (None if w is None else torch.where(once, w, 0.0) for w in mine[3:5])
        return mine._replace(coefficients=c, entropy_coefficients=b)

    def whole(self, own: Tensor, axis: int = 0) -> Tensor:
        """What every rank found of its rows along ``axis``, in the order of the batch."""
        everyone = all_gather(self.mesh, own.movedim(axis, 0)).flatten(0, 1)
        out = everyone.new_empty(int(self.first.sum()), *everyone.shape[1:])
        out[self.table[self.first]] = everyone[self.first.flatten()]
        return out.movedim(0, axis)

    def whole_values(self, own: TokenValues) -> TokenValues:
        return TokenValues(*(self.whole(x, axis=-2) for x in own))


def partition_rows(batch: Batch, mesh: DeviceMesh, prompts: Tensor | None) -> RowPartition:
    """Rows by length in turn, so that ranks have rows of about the same lengths; ``prompts``: see ``_by_prompt``."""
    count, ranks = len(batch.input_ids), mesh.size()
    lengths = batch.attention_mask.sum(-1).tolist()
    order = sorted(range(count), key=lambda k: -lengths[k])
    each, device = -(-count // ranks), batch.input_ids.device
    if prompts is None:
        rows_by_rank = [order[rank::ranks] for rank in range(ranks)]
    else:
        rows_by_rank = _by_prompt(order, lengths, prompts.tolist(), ranks)
    # The shortest is what costs least a second time.
    table = torch.tensor([hand + order[-1:] * (each - len(hand)) for hand in rows_by_rank], device=device)
    sizes = torch.tensor([[len(hand)] for hand in rows_by_rank], device=device)
    return RowPartition(mesh, table, torch.arange(each, device=device) < sizes)


def _by_prompt(order: list[int], lengths: list[int], prompts: list[int], ranks: int) -> list[list[int]]:
    """Rows by rank, as many on each and about as many tokens, those of a prompt on one rank as far as there is room."""
    each = -(-len(order) // ranks)
    members: dict[int, list[int]] = {}
    for k in order:
        members.setdefault(prompts[k], []).append(k)
    rows_by_rank: list[list[int]] = [[] for _ in range(ranks)]
    for together in members.values():
        while together:
            hand = min((h for h in rows_by_rank if len(h) < each), key=lambda h: sum(lengths[k] for k in h))
            room = each - len(hand)
            hand += together[:room]
            together = together[room:]
    return rows_by_rank


def _blocks_down(n_a: int, n_b: int, ranks: int) -> int:
    """Into how many blocks of rows a matrix is best cut, so that each rank's block has few rows and columns."""
    return min((d for d in range(1, ranks + 1) if ranks % d == 0), key=lambda d: -(-n_a // d) + -(-n_b * d // ranks))


def _cut(count: int, pieces: int, device: torch.device) -> Tensor:
    """(pieces, m): every row once, and the last as often again as it takes to make the pieces equal."""
    each = -(-count // pieces)
    return torch.arange(each * pieces, device=device).clamp(max=count - 1).view(pieces, each)
