"""Files that every rank wrote of its shards, ``<kind>_world_size_<N>_rank_<R>.pt``, joined to complete tensors.

Source: verl-project/verl, verl/utils/checkpoint/fsdp_checkpoint_manager.py at commit 1dda039; NovaSky-AI/SkyRL,
skyrl/backends/skyrl_train/distributed/fsdp_strategy.py at a956457; inclusionAI/AReaL, areal/engine/fsdp_engine.py at
4aef98d (the optimizer alone).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_influence.interop.checkpoints.files.unpickle import Inert, LocalShard, load_inert

_NAME = re.compile(r"(model|optim)_world_size_(\d+)_rank_(\d+)\.pt")


class RankValues(NamedTuple):
    """A value of every rank.

    Attributes:
        name: of the value, for errors.
        files: one a rank, in order of the ranks.
        values: one a rank.
    """

    name: str
    files: Sequence[Path]
    values: list[Any]

    def item(self, key: Any) -> RankValues:
        """Return the values under a key, which every rank must have."""
        for file, value in zip(self.files, self.values, strict=True):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(
                    f"{file} has no {self.name}{key}; expected it, as {self.files[0]} has it. Take the files of all "
                    "ranks from one save"
                )
        return RankValues(f"{self.name}{key}.", self.files, [value[key] for value in self.values])

    def of_ranks(self, ranks: Sequence[int]) -> RankValues:
        """Return the values of some of the ranks."""
        return RankValues(self.name, [self.files[rank] for rank in ranks], [self.values[rank] for rank in ranks])


def rank_files(directory: Path, kind: str) -> list[Path]:
    """Return the files of all ranks, in order; an empty list if there are none.

    Args:
        directory: of the files.
        kind: ``model`` or ``optim``.

    Raises:
        FileNotFoundError: naming the files of missing ranks.
        ValueError: for files of several world sizes.
    """
    matches = [(file, match) for file in directory.glob(f"{kind}_world_size_*.pt") if (match := _NAME.match(file.name))]
    sizes = sorted({int(match[2]) for _, match in matches})
    if not sizes:
        return []
    if len(sizes) > 1:
        raise ValueError(
            f"{directory} has {kind} files of the world sizes {sizes}; expected one. Move those of other saves away"
        )
    files = [directory / f"{kind}_world_size_{sizes[0]}_rank_{rank}.pt" for rank in range(sizes[0])]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{directory} has no {', '.join(missing[:5])} ({len(missing)} of {sizes[0]} ranks); expected the files of "
            "all ranks. Copy them there: on several nodes each may have saved its own"
        )
    return files


def load_ranks(files: Sequence[Path]) -> RankValues:
    """Load the files of all ranks, each mapped from disk."""
    return RankValues("", files, [load_inert(file) for file in files])


def read_rank_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """Read the weights by name, each joined from the shards of all ranks.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: naming the file, for a damaged one and for shards that do not cover a tensor.
    """
    ranks = load_ranks(files)
    return {name: join(ranks.item(name)) for name in _names(ranks)}


def join(shards: RankValues) -> Any:
    """Return the value that the ranks share or divide among them.

    Raises:
        ValueError: naming the file, where shards do not cover the tensor, or a value differs between ranks.
    """
    first, name = shards.values[0], shards.name.rstrip(".")
    for file, value in zip(shards.files, shards.values, strict=True):
        if isinstance(value, Inert):
            raise ValueError(
                f"{name} in {file} is a {value!r}, which is not read; expected a DTensor or ShardedTensor. Save with "
                "FSDP2, or with SHARDED_STATE_DICT, as verl does; or merge the weights by `python -m verl.model_merger "
                "merge --backend fsdp`"
            )
        if type(value) is not type(first):
            raise ValueError(
                f"{name} in {file} is a {type(value).__name__}; expected a {type(first).__name__}, as in "
                f"{shards.files[0]}. Take the files of all ranks from one save"
            )
    if isinstance(first, LocalShard):
        return _joined(shards)
    for file, value in zip(shards.files, shards.values, strict=True):
        same = torch.equal(value, first) if isinstance(first, Tensor) else value == first
        if not same:
            raise ValueError(
                f"{name} in {file} differs from {shards.files[0]}, and is not marked as a shard; expected the same in "
                "all. Take the files of all ranks from one save"
            )
    return first


def shard_coordinates(shards: RankValues) -> list[int]:
    """Return each rank's index along the divided axis; ranks that replicate each other have the same."""
    return [rank if shard.coordinate is None else shard.coordinate for rank, shard in enumerate(shards.values)]


def _joined(shards: RankValues) -> Tensor:
    """Return a tensor from its shards, in the order of their coordinates."""
    first: LocalShard = shards.values[0]
    for file, shard in zip(shards.files, shards.values, strict=True):
        if (shard.shape, shard.axis) != (first.shape, first.axis):
            raise ValueError(
                f"{shards.name.rstrip('.')} in {file} is of shape {shard.shape}, divided along axis {shard.axis}; "
                f"expected {first.shape} and {first.axis}, as in {shards.files[0]}. Take the files of all ranks from "
                "one save"
            )
    if first.axis is None:
        return first.local
    distinct = dict(reversed(list(zip(shard_coordinates(shards), shards.values, strict=True))))
    pieces = [distinct[coordinate].local for coordinate in sorted(distinct)]
    complete = list(range(len(distinct))) == sorted(distinct)
    fits = all(_other_axes(piece.shape, first.axis) == _other_axes(first.shape, first.axis) for piece in pieces)
    if not (complete and fits and sum(piece.shape[first.axis] for piece in pieces) == first.shape[first.axis]):
        raise ValueError(
            f"{shards.name.rstrip('.')} of shape {first.shape} has shards of the shapes "
            f"{[tuple(piece.shape) for piece in pieces]} in {shards.files[0].parent}; expected shards that cover it. "
            "Take the files of all ranks from one save"
        )
    return torch.cat(pieces, dim=first.axis)


def _other_axes(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _names(ranks: RankValues) -> Iterator[Any]:
    """Yield the keys of the first rank, which must be those of all."""
    first = ranks.values[0]
    if not isinstance(first, dict):
        raise ValueError(f"{ranks.files[0]} holds a {type(first).__name__}; expected a state dict. Save one there")
    for file, value in zip(ranks.files, ranks.values, strict=True):
        if isinstance(value, dict) and (extra := sorted(map(str, set(value) - set(first)))):
            raise ValueError(
                f"{file} has {ranks.name}{extra[0]}, which {ranks.files[0]} lacks; expected the same in all. Take the "
                "files of all ranks from one save"
            )
    yield from first
