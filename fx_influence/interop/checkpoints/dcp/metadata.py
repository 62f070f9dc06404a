"""The ``.metadata`` file of a ``torch.distributed.checkpoint`` directory: which bytes of which file hold which value.

It is a pickle, and torch's own reader unpickles whatever it names. This reader admits the few classes of such
metadata and nothing else, and builds stand-ins in their place, so that torch's are not even needed. Source: torch 2.13,
``torch.distributed.checkpoint.metadata`` and ``filesystem``; torch 2.1 writes the same.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fx_influence.interop.checkpoints.files.damage import cause_of_substitution

METADATA = ".metadata"


class _Record:
    """Fields of one of torch's dataclasses; a state that is a tuple, as TensorProperties pickles, is not needed."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def _unused(*_: object) -> None:
    """Stand in for a layout, a memory format, a dtype or a path of the writing machine, which no value needs."""


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
    # Sharded tensors, and all tensors before torch 2.4.
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): _Record,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): _unused,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _unused,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): _unused,
    ("pathlib", "WindowsPath"): _unused,
    ("pathlib._local", "PosixPath"): _unused,
    ("pathlib._local", "WindowsPath"): _unused,
    # Python 3.11.0 to 3.11.3 pickle a member of an enum by getattr.
    ("builtins", "getattr"): _unused,
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler that admits only the classes of ``_ADMITTED``."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return _unused
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no such metadata holds")
        return _ADMITTED[module, name]


class Chunk(NamedTuple):
    """A rectangular chunk of a tensor, or a value that is not a tensor, and its bytes in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class Entry(NamedTuple):
    """A value: its keys in the saved dict, its shape (None if it is not a tensor) and its chunks."""

    path: tuple[str | int, ...]
    shape: tuple[int, ...] | None
    chunks: list[Chunk]


def read_metadata(file: Path) -> list[Entry]:
    """Read the entries of a ``.metadata`` file without unpickling anything but its own classes.

    Raises:
        ValueError: for a damaged file, another format, or a pickle that names anything else.
    """
    if cause := cause_of_substitution(file):
        raise ValueError(f"{file} is damaged: {cause}")
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        locations = {(i.fqn, vars(i).get("offset")): location for i, location in metadata.storage_data.items()}
        paths = metadata.planner_data or {}
        stored = metadata.state_dict_metadata.items()
        return [_entry(name, tuple(paths.get(name, (name,))), value, locations) for name, value in stored]
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
            f"{file} is damaged or of another kind ({error or type(error).__name__}); expected metadata of "
            "torch.distributed.checkpoint, since nothing else is unpickled. Save the checkpoint again with "
            "torch.distributed.checkpoint.save"
        ) from error


def _entry(name: str, path: tuple[str | int, ...], stored: Any, locations: dict[Any, Any]) -> Entry:
    if "chunks" not in vars(stored):
        return Entry(path, None, [_chunk((), (), locations[name, None])])
    chunks = [_chunk(tuple(c.offsets), tuple(c.sizes), locations[name, c.offsets]) for c in stored.chunks]
    return Entry(path, tuple(stored.size), chunks)


def _chunk(offsets: tuple[int, ...], sizes: tuple[int, ...], location: Any) -> Chunk:
    file = location.relative_path
    if Path(file).name != file or vars(location).get("transform_descriptors"):
        raise ValueError(f"a value is in {file!r}, transformed by {vars(location).get('transform_descriptors')}")
    return Chunk(offsets, sizes, file, location.offset, location.length)
