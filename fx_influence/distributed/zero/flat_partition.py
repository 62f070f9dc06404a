"""Complete parameters whose entries ZeRO-1 and 2 assign to processes: equal parts of flat vectors.

Every process has the complete weights, and of the vector of each group of parameters one part: AdamW's moments, float32
weights, and at the optimizer's step the gradient. AdamW's step is computed of these parts, and what every process needs
of it, a direction, is gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fx_influence.core.dtensor import before_collective, is_sharded, to_local
from fx_influence.distributed.collectives import all_gather_into
from fx_influence.types import Params

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Place(NamedTuple):
    """Place of a parameter in the flat vector of its group.

    Attributes:
        group: index of the group.
        start: index of the parameter's first entry in the vector.
        shape: of the parameter.
    """

    group: int
    start: int
    shape: torch.Size


@dataclass(frozen=True)
class FlatPartition:
    """Partition of flat vectors into equal parts, one for each process; see ``core.computed.Partition``.

    Attributes:
        mesh: the processes, on one axis.
        sizes: entries of a part of each group's vector, its padding included.
        places: of the parameters, by name, group by group.
    """

    mesh: DeviceMesh
    sizes: Sequence[int]
    places: Mapping[str, Place]

    def local_range(self, name: str) -> tuple[slice, slice]:
        """Return where this process's entries of a parameter are: in its part of the vector, and in the parameter."""
        place = self.places[name]
        size = self.sizes[place.group]
        start = place.start - self.mesh.get_local_rank() * size
        first = min(max(start, 0), size)
        last = max(first, min(start + place.shape.numel(), size))
        return slice(first, last), slice(first - start, last - start)

    def shard_of_part(self, name: str, part: Tensor) -> Tensor:
        """Return the shard of a parameter, see ``shard``, from this process's part of its group's vector."""
        return self._as_shard(name, part.detach()[self.local_range(name)[0]])

    def shards_of_parts(self, parts: Sequence[Tensor]) -> Params:
        """Return the shards of all parameters from this process's part of each group's vector."""
        return {name: self.shard_of_part(name, parts[place.group]) for name, place in self.places.items()}

    def shard(self, name: str, x: Tensor) -> Tensor:
        if is_sharded(x) or name not in self.places:
            return x
        return self._as_shard(name, x.detach().reshape(-1)[self.local_range(name)[1]])

    def gather_(self, shards: Params) -> Params:
        names, complete = list(shards), dict[str, Tensor]()
        for group, size in enumerate(self.sizes):
            members = [name for name in names if name in self.places and self.places[name].group == group]
            if members:
                complete |= self._gather_group_(size, {name: shards.pop(name) for name in members})
        complete |= shards
        return {name: complete[name] for name in names}

    def _gather_group_(self, size: int, shards: Params) -> Params:
        """Return the complete tensors of a group's parameters, views of one vector; ``shards`` is emptied."""
        names = list(shards)
        part = to_local(shards[names[0]]).new_zeros(size)
        for name in names:
            part[self.local_range(name)[0]] = to_local(shards.pop(name))
        flat = part.new_empty(self.mesh.size() * size)
        before_collective()
        all_gather_into(flat, part, group=self.mesh.get_group())
        places = {name: self.places[name] for name in names}
        return {name: flat[x.start : x.start + x.shape.numel()].view(x.shape) for name, x in places.items()}

    def complete(self, name: str, shard: Tensor) -> Tensor:
        local = to_local(shard)
        values = local.new_zeros(self.places[name].shape)
        values.view(-1)[self.local_range(name)[1]] = local
        before_collective()
        # Every entry is on one process, and 0 on the others.
        dist.all_reduce(values, group=self.mesh.get_group())
        return values

    def layout(self, name: str, shard: Tensor) -> Tensor:
        return torch.empty(self.places[name].shape, dtype=shard.dtype, device="meta")

    def _as_shard(self, name: str, local: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        layout: dict[str, Any] = {"shape": (self.places[name].shape.numel(),), "stride": (1,), "run_check": False}
        return DTensor.from_local(local, self.mesh, [Shard(0)], **layout)
