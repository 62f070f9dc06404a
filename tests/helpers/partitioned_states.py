"""AdamW states of which each process has a part, as under DeepSpeed's ZeRO-1 and 2, and a record of collectives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from fx_influence.core.computed import PartitionedTensors
from fx_influence.distributed.zero.flat_partition import FlatPartition, Place
from fx_influence.optim.adamw import MOMENTS
from fx_influence.types import AdamWState, Params

METHODS = ("allreduce", "allgather", "_allgather_base", "all_gather_single", "broadcast", "reduce")
"""Methods of ``ProcessGroup``, some under two names, of which a version of torch may have one."""
PADDING = 3
"""Least number of entries of padding at the end of a flat vector."""


def partition_of_groups(state: AdamWState, params: Params, mesh: DeviceMesh) -> FlatPartition:
    """Return the partition of one flat vector for each set of hyperparameters."""
    groups = list(dict.fromkeys(state.hyper.values()))
    places, sizes = dict[str, Place](), list[int]()
    for index, hyper in enumerate(groups):
        members = [name for name in params if state.hyper.get(name) == hyper]
        ends = list(itertools.accumulate(params[name].numel() for name in members))
        starts = [0, *ends[:-1]]
        places |= {x: Place(index, start, params[x].shape) for x, start in zip(members, starts, strict=True)}
        sizes.append(-(-(ends[-1] + PADDING) // mesh.size()))
    return FlatPartition(mesh, sizes, places)


def partitioned_state(state: AdamWState, params: Params, mesh: DeviceMesh) -> AdamWState:
    """Return a state of which this process has its parts alone, copied from the complete tensors."""
    partition = partition_of_groups(state, params, mesh)

    def partitioned(tree: Params | None) -> Any:
        if tree is None:
            return None
        return PartitionedTensors({name: partition.shard(name, x.clone()) for name, x in tree.items()}, partition)

    return state._replace(**{name: partitioned(getattr(state, name)) for name in (*MOMENTS, "master_weights")})


class Collective(NamedTuple):
    """A collective: its name, and the bytes of its result on this process."""

    name: str
    size: int


@contextmanager
def recorded_collectives() -> Iterator[list[Collective]]:
    """Record the reductions and gathers of tensors that this process takes part in, whatever function starts them."""
    records: list[Collective] = []

    def recording(name: str) -> Callable[..., Any]:
        original = getattr(dist.ProcessGroup, name)

        def call(group: dist.ProcessGroup, result: Any, *args: Any) -> Any:
            tensors = [result] if isinstance(result, Tensor) else tree_leaves(result)
            records.append(Collective(name.strip("_"), sum(x.nbytes for x in tensors)))
            return original(group, result, *args)

        return call

    with ExitStack() as stack:
        for name in filter(partial(hasattr, dist.ProcessGroup), METHODS):
            stack.enter_context(mock.patch.object(dist.ProcessGroup, name, recording(name)))
        yield records
