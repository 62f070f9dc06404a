"""Where in a file of ``torch.save`` the numbers of a tensor stand, so that some of its rows can be read alone.

Such a file is a zip archive that keeps, without compression, a pickle of the tensor's layout and its numbers. torch
reads the numbers whole. Source: ``torch.serialization`` of torch 2.13; its format has been the same since torch 1.6.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}


def row_layout(file: IO[bytes], start: int, length: int, shape: tuple[int, ...]) -> tuple[torch.dtype, int] | None:
    """The dtype of the tensor saved in ``length`` bytes from ``start``, and where in the file its first row begins.

    None for what is not a contiguous tensor of ``shape`` and of floating point: ``torch.load`` is for that, and says
    what is wrong with what is damaged. Nothing but the layout is unpickled, and of classes none.
    """
    try:
        with zipfile.ZipFile(_Window(file, start, length)) as archive:
            records = {name.partition("/")[2]: name for name in archive.namelist()}
            saved = _LayoutUnpickler(io.BytesIO(archive.read(records["data.pkl"]))).load()
            native = "byteorder" not in records or archive.read(records["byteorder"]).decode() == sys.byteorder
            if not native or saved != _Layout(saved.dtype, saved.key, 0, shape, _contiguous(shape)):
                return None
            record = archive.getinfo(records[f"data/{saved.key}"])
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError):
        return None
    if record.compress_type != zipfile.ZIP_STORED or record.file_size < math.prod(shape) * saved.dtype.itemsize:
        return None
    file.seek(start + record.header_offset + 26)
    # the lengths of the name and of the padding, which stand before the numbers
    return saved.dtype, start + record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))


class _Layout(NamedTuple):
    dtype: torch.dtype
    key: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


def _layout(storage: tuple[torch.dtype, str], offset: int, shape: Any, stride: Any, *_: object) -> _Layout:
    return _Layout(*storage, offset, tuple(shape), tuple(stride))


class _LayoutUnpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str]:
        return pid[1], pid[2]

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _layout
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Window(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


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
