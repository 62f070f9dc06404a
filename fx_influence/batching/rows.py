"""Selection, deduplication and chunking of the rows of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fx_influence.batching.microbatch import TOKENS_PER_CHUNK
from fx_influence.types import Batch


def select_rows(batch: Batch, index: slice | Tensor) -> Batch:
    """Return the rows of a batch that ``index`` selects, in its order."""
    return Batch._make(None if field is None else field[index] for field in batch)


def has_loss(batch: Batch) -> Tensor:
    """Return which rows have a coefficient other than 0 in their completion, bool (B,).

    The gradient of any other row's loss is exactly 0, as where the completions of a prompt all earn the same.

    Example:
        >>> ids = torch.tensor([[1, 2], [1, 3], [1, 2]])
        >>> batch = Batch(ids, ids > 0, ids > 1, coefficients=torch.tensor([[5.0, 0.0], [0.0, 0.5], [0.0, -0.5]]))
        >>> has_loss(batch).tolist()
        [False, True, True]
    """
    weights = [w for w in (batch.coefficients, batch.entropy_coefficients) if w is not None]
    return torch.stack([((w != 0) & batch.completion_mask).any(-1) for w in weights]).any(0)


def distinct_rows(batch: Batch) -> tuple[Batch, Tensor]:
    """Return the rows that differ in some field, each once, and for every row the index of its equal, (B,).

    A policy of low entropy samples the same completion again and again; a quantity of a row alone is then computed
    once. ``group`` and ``behaviour_logprobs``, which no quantity of a row alone depends on, are not compared.

    Example:
        >>> ids = torch.tensor([[1, 2], [1, 3], [1, 2]])
        >>> once, index = distinct_rows(Batch(ids, ids > 0, ids > 1))
        >>> once.input_ids.tolist(), index.tolist()
        ([[1, 2], [1, 3]], [0, 1, 0])
    """
    fields = [field.double() for field in batch._replace(group=None, behaviour_logprobs=None) if field is not None]
    unique, index = torch.unique(torch.cat(fields, dim=1), dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(index), dtype=torch.int64, device=index.device)
    first.scatter_reduce_(0, index, torch.arange(len(index), device=index.device), "amin")
    return select_rows(batch, first), index


def rows_by_group(group: Tensor, num_groups: int) -> list[Tensor]:
    """Return the rows of each group 0..num_groups-1, ascending, with one wait of the host; those of -1 are left out.

    Example:
        >>> [rows.tolist() for rows in rows_by_group(torch.tensor([1, 0, -1, 1]), 3)]
        [[1], [0, 3], []]
    """
    counts = (group == torch.arange(-1, num_groups, device=group.device).unsqueeze(1)).sum(1)
    return list(group.argsort(stable=True).split(counts.tolist())[1:])


def group_of_rows(groups: Sequence[Tensor], batch: Batch) -> Tensor:
    """Return the number of each row's group, int64 (B,)."""
    number = torch.zeros_like(batch.input_ids[:, 0])
    for k, index in enumerate(groups):
        number[index] = k
    return number


def places_by_group(groups: Sequence[Tensor], num_groups: int) -> list[list[Tensor]]:
    """Return for each tensor of numbers of groups the places of each group 0..num_groups-1, with one wait of the host.

    Example:
        >>> [places] = places_by_group([torch.tensor([1, 0, 1])], 3)
        >>> [x.tolist() for x in places]
        [[1], [0, 2], []]
    """
    sizes = torch.stack([(x.unsqueeze(1) == torch.arange(num_groups, device=x.device)).sum(0) for x in groups]).tolist()
    return [list(x.argsort(stable=True).split(size)) for x, size in zip(groups, sizes, strict=True)]


def row_chunks(batch: Batch, chunk_size: int | None) -> Iterator[Batch]:
    """Yield consecutive rows, ``chunk_size`` at a time, or as many as fit ``TOKENS_PER_CHUNK``."""
    n, t = batch.input_ids.shape
    size = max(1, TOKENS_PER_CHUNK // max(t, 1)) if chunk_size is None else chunk_size
    for start in range(0, n, size):
        yield select_rows(batch, slice(start, start + size))
