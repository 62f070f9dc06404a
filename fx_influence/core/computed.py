"""Tensors by name that are made new at each access, so that one at a time is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol, TypeVar, cast

from torch import Tensor

Value = TypeVar("Value")


class ComputedTensors(Mapping[str, Tensor]):
    """Tensors by parameter name, computed at each access: dequantised, or gathered from the parts of all processes.

    Args:
        reads: by name, a function that returns the tensor.
        layout: by name, a tensor on the meta device, of shape and dtype of what ``reads`` returns. It is given where
            reading is a collective whose result is the same on every process; None otherwise.

    Example:
        >>> import torch
        >>> codes = torch.tensor([0, 2], dtype=torch.uint8)
        >>> moments = ComputedTensors({"w": lambda: 0.5 * codes.float()})
        >>> list(moments), moments["w"].tolist()
        (['w'], [0.0, 1.0])
    """

    def __init__(self, reads: Mapping[str, Callable[[], Tensor]], layout: Mapping[str, Tensor] | None = None) -> None:
        self._reads, self.layout = dict(reads), layout

    def __getitem__(self, name: str) -> Tensor:
        return self._reads[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._reads

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)


class Partition(Protocol):
    """Assignment of every entry of complete parameters to one process, which has the optimizer's state for it."""

    def shard(self, name: str, x: Tensor) -> Tensor:
        """Return the entries of a parameter's tensor that are this process's, flat, as a DTensor that aliases it.

        A DTensor is returned itself, and so is the tensor of a parameter that is not partitioned. Shards differ in
        length, so they are for ``to_local`` and sums over entries alone.
        """

    def gather_(self, shards: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the complete tensors, by one collective for each flat vector; ``shards`` is emptied meanwhile.

        They are views of these vectors.
        """

    def complete(self, name: str, shard: Tensor) -> Tensor:
        """Return the complete tensor of one parameter, by a collective."""

    def layout(self, name: str, shard: Tensor) -> Tensor:
        """Return an empty tensor of the complete tensor's shape and dtype, on the meta device."""


class PartitionedTensors(ComputedTensors):
    """Tensors of complete parameters, of each of which every process holds some entries; gathered at each access.

    Args:
        shards: by name, see ``Partition.shard``; None where a parameter has no tensor.
        partition: of the entries.
    """

    def __init__(self, shards: Mapping[str, Tensor | None], partition: Partition) -> None:
        self.shards, self.partition = shards, partition
        reads = {name: partial(_of_shard, partition.complete, name, x) for name, x in shards.items()}
        layout = {name: _of_shard(partition.layout, name, x) for name, x in shards.items()}
        super().__init__(reads, layout)


def _of_shard(call: Callable[[str, Tensor], Tensor], name: str, shard: Tensor | None) -> Tensor:
    """Return the result of a partition's method, or None, which the gradient of a parameter may be."""
    return cast(Tensor, None) if shard is None else call(name, shard)


def partition_of(tree: Mapping[str, Tensor]) -> Partition | None:
    """Return the partition of tensors by name, None where every process has all of them or DTensors."""
    return tree.partition if isinstance(tree, PartitionedTensors) else None


def local_shards(tree: Mapping[str, Value], partition: Partition | None = None) -> Mapping[str, Value]:
    """Return the shards of tensors by name, in any order without a collective; all of ``tree`` without a partition.

    Args:
        tree: tensors by parameter name, or None.
        partition: of their entries.
    """
    if isinstance(tree, PartitionedTensors):
        return cast(Mapping[str, Value], tree.shards)
    if partition is None:
        return tree
    shards = {name: None if x is None else partition.shard(name, cast(Tensor, x)) for name, x in tree.items()}
    return cast(Mapping[str, Value], shards)


def layout_of(tree: Mapping[str, Value]) -> Mapping[str, Value | Tensor]:
    """Return tensors of the same names, shapes and dtypes, without a collective: those of ``tree`` unless it has one.

    Example:
        >>> layout_of({"w": 1.0})
        {'w': 1.0}
    """
    layout = tree.layout if isinstance(tree, ComputedTensors) else None
    return tree if layout is None else layout
