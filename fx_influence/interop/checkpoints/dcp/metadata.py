"""Metadata of torch.distributed.checkpoint"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch

METADATA = ".metadata"


class _Record:
    """The fields of one of torch's dataclasses; a tuple is what TensorProperties pickles, and of no use here."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def _unused(*_: object) -> None:
    """In place of a layout, a memory format, a dtype or a path of the machine that wrote: no value needs them."""


_CLASSES = "torch.distributed.checkpoint.metadata"


_ADMITTED: dict[tuple[str, str], Any] = {
    (_CLASSES, "Metadata"): _Record,
    (_CLASSES, "MetadataIndex"): _Record,
    (_CLASSES, "TensorStorageMetadata"): _Record,
    (_CLASSES, "ChunkStorageMetadata"): _Record,
    (_CLASSES, "BytesStorageMetadata"): _Record,
    (_CLASSES, "TensorProperties"): _Record,
    (_CLASSES, "StorageMeta"): _Record,
    (_CLASSES, "_MEM_FORMAT_ENCODING"): _unused,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    # of sharded tensors, and of all before torch 2.4
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): _Record,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): _unused,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _unused,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): _unused,
    ("pathlib", "WindowsPath"): _unused,
    ("pathlib._local", "PosixPath"): _unused,
    ("pathlib._local", "WindowsPath"): _unused,
    # how Python 3.11.0 to 3.11.3 pickle a member of an enum
    ("builtins", "getattr"): _unused,
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return _unused
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no such metadata holds")
        return _ADMITTED[module, name]


class Chunk(NamedTuple):
    """A box of a tensor, or a whole value, and the bytes it stands in."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class Entry(NamedTuple):
    """One value: its keys in the saved dict, its shape (None if it is no tensor) and its pieces."""

    path: tuple[str | int, ...]
    shape: tuple[int, ...] | None
    pieces: list[Chunk]


def read_metadata(file: Path) -> list[Entry]:
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        spots = {(i.fqn, vars(i).get("offset")): spot for i, spot in metadata.storage_data.items()}
        paths = metadata.planner_data or {}
        stored = metadata.state_dict_metadata.items()
        return [_entry(name, tuple(paths.get(name, (name,))), value, spots) for name, value in stored]
    except (
        pickle.UnpicklingError,
        EOFError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{file} is damaged or no metadata of torch.distributed.checkpoint, and nothing else is unpickled: "
            f"{error or type(error).__name__}; save the checkpoint again with torch.distributed.checkpoint.save"
        ) from error


def _entry(name: str, path: tuple[str | int, ...], stored: Any, spots: dict[Any, Any]) -> Entry:
    if "chunks" not in vars(stored):
        return Entry(path, None, [_piece((), (), spots[name, None])])
    pieces = [_piece(tuple(c.offsets), tuple(c.sizes), spots[name, c.offsets]) for c in stored.chunks]
    return Entry(path, tuple(stored.size), pieces)


def _piece(offsets: tuple[int, ...], sizes: tuple[int, ...], spot: Any) -> Chunk:
    file = spot.relative_path
    if Path(file).name != file or vars(spot).get("transform_descriptors"):
        raise ValueError(f"a value stands in {file!r}, transformed by {vars(spot).get('transform_descriptors')}")
    return Chunk(offsets, sizes, file, spot.offset, spot.length)
