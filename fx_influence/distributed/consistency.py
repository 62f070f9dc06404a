"""Check that the ranks of a device mesh were given the same arguments."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fx_influence.core.computed import layout_of
from fx_influence.core.dtensor import is_sharded
from fx_influence.distributed.collectives import all_gather_objects
from fx_influence.types import AdamWState

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def check_consistent(mesh: DeviceMesh, facts: Mapping[str, object]) -> None:
    """Raise ``ValueError`` on every rank where two ranks differ in a fact, with its name and both values.

    Args:
        mesh: all ranks that make this call.
        facts: values to compare by name, see ``comparable_facts``.
    """
    by_rank = all_gather_objects(mesh, dict(facts))
    for rank, theirs in enumerate(by_rank):
        for name in by_rank[0].keys() | theirs.keys():
            ours, other = by_rank[0].get(name), theirs.get(name)
            if ours != other:
                raise ValueError(
                    f"{name} is {reprlib.repr(ours)} on rank 0 and {reprlib.repr(other)} on rank {rank}; expected the "
                    "same on every rank, as for all but the rows of batches. Pass equal values"
                )


def comparable_facts(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield the facts of an argument that ranks compare, as (name, fact).

    A dictionary of tensors gives the layout of each and one checksum of all, except that DTensors, whose shards differ
    by rank, and what is gathered from all ranks at each access give no checksum. A function gives only that it is one;
    anything else gives its value.
    """
    if isinstance(value, AdamWState):
        for field, field_value in value._asdict().items():
            yield from comparable_facts(f"{name}.{field}", field_value)
    elif isinstance(value, Mapping) and any(isinstance(x, Tensor) for x in layout_of(value).values()):
        layout = layout_of(value)
        for key, x in layout.items():
            yield f"the layout of {name}[{key!r}]", None if x is None else (tuple(x.shape), str(x.dtype))
        if layout is value and not any(x is not None and is_sharded(x) for x in value.values()):
            yield f"the checksum of {name}", checksum(value)
    else:
        yield name, "a function" if callable(value) else value


def checksum(tree: Mapping[str, Tensor | None]) -> str:
    """Return a checksum of all bits that does not depend on the order in which a device adds them up."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [int(x.view(integers[x.element_size()]).sum(dtype=torch.int64)) for x in tree.values() if x is not None]
    return f"{hash(tuple(sums)) % 2**64:016x}"
