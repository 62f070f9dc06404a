"""One batch from the rows of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fx_influence.core.batch_checks import check_fields
from fx_influence.distributed.collectives import (
    all_gather,
    all_gather_objects,
    raise_on_all_ranks,
)
from fx_influence.types import Batch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def gather_batch(mesh: DeviceMesh, field: str, batch: Batch) -> Batch:
    """The rows of all ranks as one batch, those of rank 0 first; padded on the right to the widest rank's.

    A rank may hold no row: ``input_ids`` of shape (0, T). ``group`` means the same prompt on every rank. Raises
    ``ValueError`` on every rank where one has fields that do not fit, or others than the rest.
    """
    raise_on_all_ranks(mesh, lambda: check_fields(field, batch))
    present = {name: x for name, x in batch._asdict().items() if x is not None}
    held = all_gather_objects(mesh, (batch.input_ids.shape, {name: x.dtype for name, x in present.items()}))
    full = [(shape, dtypes) for shape, dtypes in held if shape[0]]
    if not full:
        raise ValueError(f"{field}.input_ids has no row on any of {len(held)} ranks; pass at least one rollout")
    for name in Batch._fields:
        kinds = [dtypes.get(name) for _, dtypes in full]
        if len(set(kinds)) > 1:
            raise ValueError(f"{field}.{name} is {kinds} by rank; pass the same fields of one dtype on every rank")
    counts, width = [shape[0] for shape, _ in held], max(shape[1] for shape, _ in full)

    def field_of_all(name: str, dtype: torch.dtype) -> Tensor:
        own, size = getattr(batch, name), (max(counts), width)[: 1 if name == "group" else 2]
        padded = torch.zeros(size, dtype=dtype, device=batch.input_ids.device)
        if own is not None:
            padded[tuple(slice(n) for n in own.shape)] = own
        return torch.cat([x[:count] for x, count in zip(all_gather(mesh, padded), counts, strict=True)])

    return Batch(**{name: field_of_all(name, dtype) for name, dtype in full[0][1].items()})
