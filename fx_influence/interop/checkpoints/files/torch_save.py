"""Files of ``torch.save`` read without unpickling, complete or only some rows of a tensor.

Such a file is a zip archive that contains, uncompressed, a pickle of the tensor's layout and its numbers. torch reads
all of the numbers. Source: ``torch.serialization`` of torch 2.13; its format has been the same since torch 1.6.
"""

from __future__ import annotations

import importlib
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

from fx_influence.interop.checkpoints.files.damage import cause_of_damage

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}


def row_layout(file: IO[bytes], start: int, length: int, shape: tuple[int, ...]) -> tuple[torch.dtype, int] | None:
    """Find the numbers of a tensor in a file that contains what ``torch.save`` wrote for it.

    Nothing but the layout is unpickled, and no classes are.

    Args:
        file: the file, opened for reading bytes.
        start: offset of the archive in bytes.
        length: size of the archive in bytes.
        shape: the shape that the tensor must have.

    Returns:
        The dtype and the offset in bytes of the first row; None for anything but a contiguous floating-point tensor of
        ``shape``, which ``torch.load`` reads, and which names what is wrong with a damaged one.
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
    # The local header ends with the lengths of the name and of the padding that precede the numbers.
    return saved.dtype, start + record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))


class _Layout(NamedTuple):
    """Position, shape and stride of a tensor in its storage."""

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
    """Unpickler of a tensor's layout, which refuses every other class."""

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
    """A range of bytes of a file, as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(
            0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        )
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        data = self._file.read(max(0, min(len(buffer), self._length - self._position)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def load_values(file: Path | IO[bytes], name: str) -> Any:
    """Load what ``torch.save`` wrote, on the CPU.

    Tensors of torchao's classes are read where torchao is installed, which names them to torch as safe to load.

    Raises:
        ValueError: with ``name``, for a damaged file or more than tensors and plain values.
    """
    if isinstance(file, Path) and (cause := cause_of_damage(file)):
        raise ValueError(f"{name} is damaged: {cause}")
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if "torchao.optim" not in str(error) or not _torchao_names_its_classes():
                raise
            if not isinstance(file, Path):
                file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        class_name = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        raise ValueError(
            f"{name} is damaged or holds more than tensors and plain "
            f"values{f' ({class_name[1]})' if class_name else ''}, which are never unpickled; expected plain state "
            "dicts. Save these there"
        ) from error


def _torchao_names_its_classes() -> bool:
    """Import the optimizers of torchao, which adds their tensors to torch's safe classes; return whether that works."""
    try:
        importlib.import_module("torchao.optim")
    except ImportError:
        return False
    return True
