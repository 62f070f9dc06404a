"""Values of a ``torch.distributed.checkpoint`` directory, complete or in slices, without unpickling.

A directory holds ``.metadata``, see ``metadata``, and files of values, each as ``torch.save`` writes it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_influence.interop.checkpoints.dcp.metadata import METADATA, Chunk, Entry, read_metadata
from fx_influence.interop.checkpoints.files.damage import cause_of_substitution
from fx_influence.interop.checkpoints.files.torch_save import load_values, row_layout

MAX_READ_BYTES = 2**24
"""Approximate number of bytes of a stored tensor that are read at a time."""


class StoredValue(NamedTuple):
    """A value of a directory that has not been read; ``shape`` is None if it is not a tensor."""

    directory: Path
    name: str
    shape: tuple[int, ...] | None
    chunks: list[Chunk]


def has_values(directory: Path, names: Sequence[str]) -> bool:
    """Return whether ``read_values`` finds anything; False if there is no ``.metadata``."""
    file = directory / METADATA
    return file.is_file() and any(_keys_below(entry.path, names) for entry in read_metadata(file))


def read_values(directory: Path, names: Sequence[str]) -> Any:
    """Read the values of a saved state dict under any of ``names``, nested as saved; an empty dict if there are none.

    Args:
        directory: written by ``torch.distributed.checkpoint.save``, from any number of processes; the shards of a
            tensor are put together on the CPU.
        names: keys of the saved dict, or of a dict inside it, where a tutorial of torch puts them.

    Returns:
        The nested dict. Keys below ``names`` are strings, whatever they were: torch saves them so.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for damaged files, another format, metadata that names anything but its own classes, and values that
            are not tensors or plain values, none of which is ever unpickled.

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
    return _read_tree(directory, names, _read_value)


def has_top_level_tensors(directory: Path) -> bool:
    """Return whether the saved dict has tensors beside its dicts, as torchtitan saves the weights."""
    return (directory / METADATA).is_file() and any(
        _is_top_level(entry) for entry in read_metadata(directory / METADATA)
    )


def read_top_level_tensors(directory: Path) -> dict[str, Tensor]:
    """Read the tensors that the saved dict has beside its dicts, by name.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for damaged files, and for the names of torchtitan's models, which are not those of transformers.
    """
    entries = [entry for entry in read_metadata(directory / METADATA) if _is_top_level(entry)]
    names = {str(entry.path[0]) for entry in entries}
    if "tok_embeddings.weight" in names:
        raise ValueError(
            f"{directory} has the weight tok_embeddings.weight, as torchtitan's own models; expected the names of "
            "transformers. Convert the weights with torchtitan's scripts/checkpoint_conversion/convert_to_hf.py and "
            "pass optimizer=False, or train its transformers_modeling_backend"
        )
    return {
        str(entry.path[0]): _read_value(StoredValue(directory, str(entry.path[0]), *entry[1:])) for entry in entries
    }


def _is_top_level(entry: Entry) -> bool:
    return len(entry.path) == 1 and bool(entry.shape)


def locate_values(directory: Path, names: Sequence[str]) -> Any:
    """Read as ``read_values`` does, but leave every tensor of one axis or more unread, as ``StoredValue``."""
    return _read_tree(directory, names, lambda stored: stored if stored.shape else _read_value(stored))


def read_slice(stored: StoredValue, offsets: Sequence[int], out: Tensor, max_read_bytes: int = MAX_READ_BYTES) -> None:
    """Fill ``out`` with a slice of a stored tensor, in the dtype of ``out``.

    Only files of chunks that overlap the slice are opened, and of those only the overlapping rows are read.

    Args:
        stored: the tensor.
        offsets: index per axis at which the slice begins.
        out: the tensor to fill, of the shape of the slice.
        max_read_bytes: approximate number of bytes that are read at a time.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for damaged files, and if the chunks do not cover the slice.
    """
    filled = 0
    for chunk in stored.chunks:
        begin = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
        ends = zip(offsets, out.shape, chunk.offsets, chunk.sizes, strict=True)
        end = [min(a + n, b + m) for a, n, b, m in ends]
        if all(a < b for a, b in zip(begin, end, strict=True)):
            source = _relative(begin, end, chunk.offsets)
            target = _relative(begin, end, offsets)
            for row, values in _read_rows(stored, chunk, source[0], max_read_bytes):
                target_row = row + chunk.offsets[0] - offsets[0]
                rows = slice(target_row, target_row + len(values))
                out[(rows, *target[1:])] = values[(slice(None), *source[1:])]
            filled += math.prod(b - a for a, b in zip(begin, end, strict=True))
    if filled != out.numel():
        raise _incomplete(stored)


def _relative(begin: Sequence[int], end: Sequence[int], origin: Sequence[int]) -> list[slice]:
    """Return the slices from ``begin`` to ``end``, counted from ``origin``."""
    return [slice(a - o, b - o) for a, b, o in zip(begin, end, origin, strict=True)]


def _read_tree(directory: Path, names: Sequence[str], read: Callable[[StoredValue], Any]) -> Any:
    """Return the values under ``names``, read by ``read`` and nested by their keys."""
    tree: dict[str | int, Any] = {}
    for path, shape, chunks in read_metadata(directory / METADATA):
        keys = _keys_below(path, names)
        if keys:
            node = tree
            for key in keys[:-1]:
                node = node.setdefault(key, {})
            node[keys[-1]] = read(StoredValue(directory, ".".join(map(str, path)), shape, chunks))
    return _with_lists(tree)


def _keys_below(path: tuple[str | int, ...], names: Sequence[str]) -> tuple[str | int, ...]:
    """Return the keys after the first or second one if that is one of ``names``, else nothing.

    NeMo-RL saves the optimizer under ``optim.optim``, beside ``optim.sched``.
    """
    keys = next((path[depth + 1 :] for depth in (0, 1) if path[depth : depth + 1] and path[depth] in names), ())
    return keys[1:] if keys[1:] and keys[0] in names else keys


def _read_value(stored: StoredValue) -> Any:
    """Read a complete value; a tensor is put together from its chunks."""
    directory, name, shape, chunks = stored
    if shape is None:
        return _read_chunk(directory, name, chunks[0])
    tensor: Tensor | None = None
    for chunk in chunks:
        values = _read_chunk(directory, name, chunk)
        if chunk.sizes == shape:
            return values
        tensor = values.new_empty(shape) if tensor is None else tensor
        index = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        tensor[index] = values
    if tensor is None or sum(math.prod(chunk.sizes) for chunk in chunks) != tensor.numel():
        raise _incomplete(stored)
    return tensor


def _incomplete(stored: StoredValue) -> ValueError:
    """Return the error for a tensor that the chunks of a directory do not cover."""
    return ValueError(
        f"{stored.name} of shape {stored.shape} is not complete in {stored.directory}; expected chunks that cover it. "
        "Save the checkpoint again"
    )


def _read_rows(stored: StoredValue, chunk: Chunk, rows: slice, max_read_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the rows of a chunk in groups, each with the index of its first row."""
    name = f"{stored.name} in {stored.directory / chunk.file}"
    with (stored.directory / chunk.file).open("rb") as file:
        layout = row_layout(file, chunk.start, chunk.length, chunk.sizes)
        if layout is None:
            yield rows.start, _read_chunk(stored.directory, stored.name, chunk)[rows]
            return
        dtype, start = layout
        width = math.prod(chunk.sizes[1:])
        step = max(1, max_read_bytes // (width * dtype.itemsize))
        for first in range(rows.start, rows.stop, step):
            count = min(step, rows.stop - first)
            values = torch.empty(count * width, dtype=dtype)
            file.seek(start + first * width * dtype.itemsize)
            buffer: Any = values.view(torch.uint8).numpy()
            if file.readinto(buffer) != values.nbytes:
                raise ValueError(
                    f"{name} is damaged: it ends too early; expected all of its bytes. Save the checkpoint again"
                )
            yield first, values.view(count, *chunk.sizes[1:])


def _read_chunk(directory: Path, name: str, chunk: Chunk) -> Any:
    """Read the values of a chunk."""
    path = directory / chunk.file
    with path.open("rb") as file:
        file.seek(chunk.start)
        content = file.read(chunk.length)
    if len(content) < chunk.length:
        cause = cause_of_substitution(path) or "cut off; expected the complete file. Copy or save it there again"
        raise ValueError(f"{name} in {path} is damaged: {cause}")
    return load_values(io.BytesIO(content), f"{name} in {path}")


def _with_lists(node: Any) -> Any:
    """Turn dicts with integer keys, which stand for the items of a list, into lists."""
    if not isinstance(node, dict):
        return node
    children = {key: _with_lists(child) for key, child in node.items()}
    if children and all(isinstance(key, int) for key in children):
        return [children[key] for key in sorted(children)]
    return children
