"""Gather one batch from the rows of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fx_influence.core.batch_checks import check_fields
from fx_influence.distributed.collectives import all_gather, all_gather_objects, raise_on_all_ranks
from fx_influence.types import Batch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def gather_batch(mesh: DeviceMesh, field: str, batch: Batch) -> Batch:
    """Return the rows of all ranks as one batch, rank 0's first, padded on the right to the width of the widest rank.

    Args:
        mesh: all ranks that make this call.
        field: name of the batch, for errors.
        batch: this rank's rows (b, T), perhaps none: ``input_ids`` of shape (0, T). Equal values of ``group`` mean the
            same prompt on every rank.

    Raises:
        ValueError: on every rank, where one has fields that do not fit, or other fields than the rest.
    """
    raise_on_all_ranks(mesh, lambda: check_fields(field, batch))
    present = {name: x for name, x in batch._asdict().items() if x is not None}
    by_rank = all_gather_objects(mesh, (batch.input_ids.shape, {name: x.dtype for name, x in present.items()}))
    nonempty = [(shape, dtypes) for shape, dtypes in by_rank if shape[0]]
    if not nonempty:
        raise ValueError(f"{field}.input_ids has no row on any of {len(by_rank)} ranks; expected at least one rollout")
    for name in Batch._fields:
        kinds = [dtypes.get(name) for _, dtypes in nonempty]
        if len(set(kinds)) > 1:
            raise ValueError(f"{field}.{name} is {kinds} by rank; expected the same fields of one dtype on every rank")
    counts, width = [shape[0] for shape, _ in by_rank], max(shape[1] for shape, _ in nonempty)

    def gather_field(name: str, dtype: torch.dtype) -> Tensor:
        local, size = getattr(batch, name), (max(counts), width)[: 1 if name == "group" else 2]
        padded = torch.zeros(size, dtype=dtype, device=batch.input_ids.device)
        if local is not None:
            padded[tuple(slice(n) for n in local.shape)] = local
        return torch.cat([x[:count] for x, count in zip(all_gather(mesh, padded), counts, strict=True)])

    return Batch(**{name: gather_field(name, dtype) for name, dtype in nonempty[0][1].items()})
