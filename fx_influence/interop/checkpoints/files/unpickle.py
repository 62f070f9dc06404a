"""Files of ``torch.save`` that hold more than tensors, read without running anything that they name.

torch's own safe reader refuses such a file as a unit. This one builds tensors and plain values, and puts an ``Inert``
object wherever the pickle names any other class or function, so that nothing of theirs is imported or called.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _rebuild_parameter, _rebuild_tensor, _rebuild_tensor_v2

from fx_influence.interop.checkpoints.files.damage import ZIP, cause_of_damage


class LocalShard(NamedTuple):
    """A rank's share of a ``DTensor`` or ``ShardedTensor``.

    Attributes:
        local: the share, without rows where the rank has none.
        shape: of the complete tensor.
        axis: that is divided; None if every rank has the complete tensor.
        coordinate: index of the share along ``axis``; None if the file does not say.
    """

    local: Tensor
    shape: tuple[int, ...]
    axis: int | None
    coordinate: int | None


class Inert:
    """A stand-in for an object, class or function that the reader does not build; it only keeps what it was given."""

    name = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **_: Any) -> Any:
        stand_in = object.__new__(cls)
        stand_in.args = args
        return stand_in

    def __init__(self, *_: Any, **__: Any) -> None:
        # Subclasses of builtins pass their arguments on otherwise.
        pass

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...

    def __repr__(self) -> str:
        return self.name


def _rebuild_from_type(function: Any, kind: Any, args: tuple[Any, ...], state: Any) -> Any:
    """Build a ``LocalShard`` of a DTensor or ShardedTensor, and the tensor itself of one that has attributes."""
    if function in (_rebuild_tensor_v2, _rebuild_tensor, _rebuild_parameter):
        return function(*args)
    if getattr(kind, "name", "") == _SHARDED_TENSOR:
        return _sharded_tensor_share(args[1], tuple(args[2]), state)
    attributes = state[1] if isinstance(state, tuple) and len(state) == 2 else state
    if not (getattr(kind, "name", "").endswith("DTensor") and isinstance(attributes, dict)):
        return Inert(function, kind)
    return _local_shard(attributes["_local_tensor"], attributes["_spec"].state)


def _local_shard(local: Tensor, spec: dict[str, Any]) -> LocalShard:
    """Return a rank's share, from the local tensor and the fields of its ``DTensorSpec``."""
    placements = spec["placements"]
    kinds = [type(placement).name.rpartition(".")[2] for placement in placements]
    sharded = [place for place, kind in enumerate(kinds) if kind == "Shard"]
    if len(sharded) > 1 or set(kinds) - {"Shard", "Replicate"}:
        raise pickle.UnpicklingError(
            f"a DTensor has the placements {kinds}, and only one that shards one axis is read (no tensor parallelism)"
        )
    shape = tuple(spec["tensor_meta"].args[0])
    if not sharded:
        return LocalShard(local, shape, None, None)
    fields = placements[sharded[0]].state or {}
    axis = fields["dim"] if "dim" in fields else placements[sharded[0]].args[0]
    coordinates = (spec["mesh"].state or {}).get("_coordinate_on_dim")
    coordinate = None if coordinates is None else coordinates[sharded[0]]
    return LocalShard(local, shape, axis, None if coordinate is None else int(coordinate))


def _sharded_tensor_share(dtype: torch.dtype, shape: tuple[int, ...], state: tuple[Any, ...]) -> LocalShard:
    """Return a rank's share of a ``ShardedTensor``.

    Args:
        dtype: of the complete tensor.
        shape: of the complete tensor.
        state: what ``ShardedTensor.__getstate__`` returns: the rank's shards, the metadata of all ranks' shards, and
            the rank's place in its process group.
    """
    shards, metadata, place = state[:3]
    coordinate = int(_fields(place)["local_rank"])
    bounds = [_fields(shard) for shard in _fields(metadata)["shards_metadata"]]
    axes = {axis for shard in bounds for axis, size in enumerate(shard["shard_sizes"]) if size != shape[axis]} or {0}
    axis = min(axes)
    starts = [shard["shard_offsets"][axis] for shard in bounds]
    if len(axes) > 1 or len(shards) > 1 or starts != sorted(starts):
        raise pickle.UnpicklingError(
            f"a ShardedTensor of shape {shape} has {len(shards)} shards here, divided along {sorted(axes)}, that start "
            f"at {starts}; read is one shard a rank, along one axis, in the order of the ranks"
        )
    if shards:
        return LocalShard(_fields(shards[0])["tensor"], shape, axis, coordinate)
    return LocalShard(torch.empty(*shape[:axis], 0, *shape[axis + 1 :], dtype=dtype), shape, axis, coordinate)


def _fields(stand_in: Inert) -> dict[str, Any]:
    """Return the attributes of an object, of a class with slots or without."""
    fields: dict[str, Any] = stand_in.state if isinstance(stand_in.state, dict) else stand_in.state[1]
    return fields


def _nested_class(owner: Any, name: str) -> Any:
    """Return the stand-in for a class inside a class, which older protocols of pickle name by ``getattr``."""
    if not (isinstance(owner, type) and issubclass(owner, Inert)):
        raise pickle.UnpicklingError(f"getattr of {owner!r} and {name!r} is not read")
    return type(name, (Inert,), {"name": f"{owner.name}.{name}"})


_SHARDED_TENSOR = "torch.distributed._shard.sharded_tensor.api.ShardedTensor"

_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "set"): set,
    ("builtins", "getattr"): _nested_class,
    ("__builtin__", "getattr"): _nested_class,
    # An enum of integers, which its number stands for.
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): int,
}


class _Unpickler(pickle.Unpickler):
    """Unpickler that builds what ``_ADMITTED`` names, and ``Inert`` objects of all else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        return type(name, (Inert,), {"name": f"{module}.{name}"})


# torch asks a module of this interface; its own part builds the storages.
_MODULE: Any = SimpleNamespace(
    __name__="fx_influence.unpickle",
    Unpickler=_Unpickler,
    load=lambda file, **options: _Unpickler(file, **options).load(),
    PickleError=pickle.PickleError,
    UnpicklingError=pickle.UnpicklingError,
)


def load_inert(file: Path) -> Any:
    """Load what ``torch.save`` wrote, on the CPU and mapped from the file where possible.

    Args:
        file: of ``torch.save``.

    Returns:
        The value, with a ``LocalShard`` in place of every DTensor and ShardedTensor, and ``Inert`` objects in place of
        all that is neither a tensor nor a plain value.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: with the file, for a damaged one.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; expected a file of this checkpoint. Copy it there")
    if cause := cause_of_damage(file):
        raise ValueError(f"{file} is damaged: {cause}")
    try:
        with file.open("rb") as stream:
            mapped = stream.read(4) == ZIP
        options: dict[str, Any] = {"map_location": "cpu", "pickle_module": _MODULE, "weights_only": False}
        return torch.load(file, mmap=mapped, **options)
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{file} is damaged or of another kind ({error or type(error).__name__}); expected what torch.save writes, "
            "complete. Copy or save it there again"
        ) from error
