"""Checkpoints of ``torch.distributed.checkpoint`` read whole or in parts, and saved values read without unpickling.

A directory holds ``.metadata``, a pickle that says which bytes of which file are which value, and files of values,
each as ``torch.save`` writes it. torch's own reader unpickles whatever stands in the first. Here a pickle may name the
few classes of such metadata and nothing else, and stand-ins are built in their place, so that torch's are not even
needed. Source: torch 2.13, ``torch.distributed.checkpoint.metadata`` and ``filesystem``; torch 2.1 writes the same.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from fx_influence.interop.checkpoints.torch_save import row_layout

METADATA = ".metadata"
BYTES_AT_ONCE = 2**24


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


class _Piece(NamedTuple):
    """A box of a tensor, or a whole value, and the bytes it stands in."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class Stored(NamedTuple):
    """A value in a directory, unread; ``shape`` is None if it is no tensor."""

    directory: Path
    name: str
    shape: tuple[int, ...] | None
    pieces: list[_Piece]


class _Entry(NamedTuple):
    """One value: its keys in the saved dict, its shape (None if it is no tensor) and its pieces."""

    path: tuple[str | int, ...]
    shape: tuple[int, ...] | None
    pieces: list[_Piece]


def has_part(directory: Path, names: Sequence[str]) -> bool:
    """Whether ``read_part`` would find anything; False where there is no ``.metadata``."""
    file = directory / METADATA
    return file.is_file() and any(_below(entry.path, names) for entry in _entries(file))


def read_part(directory: Path, names: Sequence[str]) -> Any:
    """What a saved state dict holds under any of ``names``, nested as it was; an empty dict if that is nothing.

    ``directory``: of ``torch.distributed.checkpoint.save``, by any number of processes; the shards of a tensor are put
    together on the CPU. ``names``: keys of the saved dict, or of a dict inside it, where a tutorial of torch puts them.
    Other keys are strings, whatever they were: torch saves them so.

    Raises ``ValueError`` for what is damaged or of another format, metadata that names anything but its own classes and
    values that are not tensors and plain values, none of which is ever unpickled; ``FileNotFoundError`` for a file.

    Example:
        >>> import tempfile, warnings
        >>> from torch.distributed import checkpoint as dcp
        >>> saved = {"model": {"w": torch.arange(3)}, "optim": {"param_groups": [{"lr": torch.tensor(0.5)}]}}
        >>> with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # that this is a single process
        ...     _ = dcp.save(saved, checkpoint_id=directory)
        ...     read_part(Path(directory), ["model"]), read_part(Path(directory), ["optim", "optimizer"])
        ({'w': tensor([0, 1, 2])}, {'param_groups': [{'lr': tensor(0.5000)}]})
    """
    return _part(directory, names, lambda stored: _whole(stored))


def stored_part(directory: Path, names: Sequence[str]) -> Any:
    """``read_part`` with every tensor of one axis or more left unread, as ``Stored``."""
    return _part(directory, names, lambda stored: stored if stored.shape else _whole(stored))


def _part(directory: Path, names: Sequence[str], found: Callable[[Stored], Any]) -> Any:
    tree: dict[str | int, Any] = {}
    for path, shape, pieces in _entries(directory / METADATA):
        below = _below(path, names)
        if below:
            node = tree
            for key in below[:-1]:
                node = node.setdefault(key, {})
            node[below[-1]] = found(Stored(directory, ".".join(map(str, path)), shape, pieces))
    return _with_lists(tree)


def load_values(file: Path | IO[bytes], name: str) -> Any:
    """What ``torch.save`` wrote, on the CPU. ``ValueError``, with ``name``, for more than tensors and plain values."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        named = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        raise ValueError(
            f"{name} is damaged or holds more than tensors and plain values{f' ({named[1]})' if named else ''}, which "
            "are never unpickled; save plain state dicts there"
        ) from error


def _entries(file: Path) -> list[_Entry]:
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


def _entry(name: str, path: tuple[str | int, ...], stored: Any, spots: dict[Any, Any]) -> _Entry:
    if "chunks" not in vars(stored):
        return _Entry(path, None, [_piece((), (), spots[name, None])])
    pieces = [_piece(tuple(c.offsets), tuple(c.sizes), spots[name, c.offsets]) for c in stored.chunks]
    return _Entry(path, tuple(stored.size), pieces)


def _piece(offsets: tuple[int, ...], sizes: tuple[int, ...], spot: Any) -> _Piece:
    file = spot.relative_path
    if Path(file).name != file or vars(spot).get("transform_descriptors"):
        raise ValueError(f"a value stands in {file!r}, transformed by {vars(spot).get('transform_descriptors')}")
    return _Piece(offsets, sizes, file, spot.offset, spot.length)


def _below(path: tuple[str | int, ...], names: Sequence[str]) -> tuple[str | int, ...]:
    """The keys after the first of ``names``, which is the first or the second."""
    return next((path[depth + 1 :] for depth in (0, 1) if path[depth : depth + 1] and path[depth] in names), ())


def _whole(stored: Stored) -> Any:
    directory, name, shape, pieces = stored
    if shape is None:
        return _read(directory, name, pieces[0])
    whole: Tensor | None = None
    for piece in pieces:
        part = _read(directory, name, piece)
        if piece.sizes == shape:
            return part
        whole = part.new_empty(shape) if whole is None else whole
        whole[tuple(slice(start, start + size) for start, size in zip(piece.offsets, piece.sizes, strict=True))] = part
    if whole is None or sum(math.prod(piece.sizes) for piece in pieces) != whole.numel():
        raise _not_all_there(stored)
    return whole


def _not_all_there(stored: Stored) -> ValueError:
    return ValueError(
        f"{stored.name} of shape {stored.shape} is not all in {stored.directory}; save the checkpoint again"
    )


def read_box(stored: Stored, offsets: Sequence[int], out: Tensor) -> None:
    """Fill ``out`` with the box of its shape that begins at ``offsets`` in a stored tensor, in the dtype of ``out``.

    Only files of pieces that reach into the box are opened, and of those the rows that do are read, at most about
    ``BYTES_AT_ONCE`` at a time. Raises as ``read_part``.
    """
    found = 0
    for piece in stored.pieces:
        begin = [max(a, b) for a, b in zip(offsets, piece.offsets, strict=True)]
        ends = zip(offsets, out.shape, piece.offsets, piece.sizes, strict=True)
        end = [min(a + n, b + m) for a, n, b, m in ends]
        if all(a < b for a, b in zip(begin, end, strict=True)):
            inside = [slice(a - o, b - o) for a, b, o in zip(begin, end, piece.offsets, strict=True)]
            for row, part in _rows(stored, piece, inside[0]):
                at = row + piece.offsets[0] - offsets[0]
                places = [slice(a - o, b - o) for a, b, o in zip(begin, end, offsets, strict=True)]
                out[(slice(at, at + len(part)), *places[1:])] = part[(slice(None), *inside[1:])]
            found += math.prod(b - a for a, b in zip(begin, end, strict=True))
    if found != out.numel():
        raise _not_all_there(stored)


def _rows(stored: Stored, piece: _Piece, rows: slice) -> Iterator[tuple[int, Tensor]]:
    """The rows of a piece some at a time, each with the first's index."""
    name = f"{stored.name} in {stored.directory / piece.file}"
    with (stored.directory / piece.file).open("rb") as file:
        layout = row_layout(file, piece.start, piece.length, piece.sizes)
        if layout is None:
            yield rows.start, _read(stored.directory, stored.name, piece)[rows]
            return
        dtype, start = layout
        width = math.prod(piece.sizes[1:])
        step = max(1, BYTES_AT_ONCE // (width * dtype.itemsize))
        for first in range(rows.start, rows.stop, step):
            count = min(step, rows.stop - first)
            part = torch.empty(count * width, dtype=dtype)
            file.seek(start + first * width * dtype.itemsize)
            numbers: Any = part.view(torch.uint8).numpy()
            if file.readinto(numbers) != part.nbytes:
                raise ValueError(f"{name} is damaged: it ends too early; save the checkpoint again")
            yield first, part.view(count, *piece.sizes[1:])


def _read(directory: Path, name: str, piece: _Piece) -> Any:
    with (directory / piece.file).open("rb") as file:
        file.seek(piece.start)
        return load_values(io.BytesIO(file.read(piece.length)), f"{name} in {directory / piece.file}")


def _with_lists(node: Any) -> Any:
    """Integer keys stand for the places in a list."""
    if not isinstance(node, dict):
        return node
    children = {key: _with_lists(child) for key, child in node.items()}
    return (
        [children[i] for i in sorted(children)] if children and all(isinstance(k, int) for k in children) else children
    )
