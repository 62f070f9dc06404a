"""Checkpoints of ``torch.distributed.checkpoint`` read whole or in parts, and saved values read without unpickling.

A directory holds ``.metadata``, a pickle that says which bytes of which file are which value, and files of values,
each as ``torch.save`` writes it. torch's own reader unpickles whatever stands in the first. Here a pickle may name the
few classes of such metadata and nothing else, and stand-ins are built in their place, so that torch's are not even
needed. Source: torch 2.13, ``torch.distributed.checkpoint.metadata`` and ``filesystem``; torch 2.1 writes the same.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_influence.interop.checkpoints.dcp.metadata import METADATA, Chunk, read_metadata
from fx_influence.interop.checkpoints.torch_save import load_values, row_layout

BYTES_AT_ONCE = 2**24


class StoredValue(NamedTuple):
    """A value in a directory, unread; ``shape`` is None if it is no tensor."""

    directory: Path
    name: str
    shape: tuple[int, ...] | None
    pieces: list[Chunk]


def has_values(directory: Path, names: Sequence[str]) -> bool:
    """Whether ``read_values`` would find anything; False where there is no ``.metadata``."""
    file = directory / METADATA
    return file.is_file() and any(_below(entry.path, names) for entry in read_metadata(file))


def read_values(directory: Path, names: Sequence[str]) -> Any:
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
        ...     read_values(Path(directory), ["model"]), read_values(Path(directory), ["optim", "optimizer"])
        ({'w': tensor([0, 1, 2])}, {'param_groups': [{'lr': tensor(0.5000)}]})
    """
    return _part(directory, names, lambda stored: _whole(stored))


def locate_values(directory: Path, names: Sequence[str]) -> Any:
    """``read_values`` with every tensor of one axis or more left unread, as ``StoredValue``."""
    return _part(directory, names, lambda stored: stored if stored.shape else _whole(stored))


def _part(directory: Path, names: Sequence[str], found: Callable[[StoredValue], Any]) -> Any:
    tree: dict[str | int, Any] = {}
    for path, shape, pieces in read_metadata(directory / METADATA):
        below = _below(path, names)
        if below:
            node = tree
            for key in below[:-1]:
                node = node.setdefault(key, {})
            node[below[-1]] = found(StoredValue(directory, ".".join(map(str, path)), shape, pieces))
    return _with_lists(tree)


def _below(path: tuple[str | int, ...], names: Sequence[str]) -> tuple[str | int, ...]:
    """The keys after the first of ``names``, which is the first or the second."""
    return next((path[depth + 1 :] for depth in (0, 1) if path[depth : depth + 1] and path[depth] in names), ())


def _whole(stored: StoredValue) -> Any:
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


def _not_all_there(stored: StoredValue) -> ValueError:
    return ValueError(
        f"{stored.name} of shape {stored.shape} is not all in {stored.directory}; save the checkpoint again"
    )


def read_slice(stored: StoredValue, offsets: Sequence[int], out: Tensor) -> None:
    """Fill ``out`` with the box of its shape that begins at ``offsets`` in a stored tensor, in the dtype of ``out``.

    Only files of pieces that reach into the box are opened, and of those the rows that do are read, at most about
    ``BYTES_AT_ONCE`` at a time. Raises as ``read_values``.
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


def _rows(stored: StoredValue, piece: Chunk, rows: slice) -> Iterator[tuple[int, Tensor]]:
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


def _read(directory: Path, name: str, piece: Chunk) -> Any:
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
