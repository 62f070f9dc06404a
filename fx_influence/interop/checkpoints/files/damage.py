"""Causes of unreadable files: pointers of git-lfs, pages of an error, and files that end too early."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

_LFS = b"version https://git-lfs"
_PAGE = (b"<!doctype", b"<html", b"<?xml")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".model", ".txt")
ZIP = b"PK\x03\x04"


def cause_of_damage(file: Path) -> str | None:
    """Return what a file is in place of its contents, with the remedy; None if its first and last bytes look right.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        ...     _ = file.write(b"version https://git-lfs.github.com/spec/v1")
        ...     file.flush()
        ...     cause_of_damage(Path(file.name))
        'a pointer of git-lfs, without the data; expected the data. Run git lfs pull'
    """
    head = _head(file)
    if cause := cause_of_substitution(file):
        return cause
    if not head:
        return "empty; expected the data. Copy or save it there again"
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        return _short_safetensors(file, head, size)
    if head.startswith(ZIP) and not zipfile.is_zipfile(file):
        return f"cut off after {size} bytes; expected the complete file. Copy or save it there again"
    return None


def cause_of_substitution(file: Path) -> str | None:
    """Return what stands in a file in place of its contents, with the remedy: a pointer or a page; None if neither."""
    head = _head(file)
    if head.startswith(_LFS):
        return "a pointer of git-lfs, without the data; expected the data. Run git lfs pull"
    if head.lstrip()[:16].lower().startswith(_PAGE):
        return "an HTML or XML page, such as an error of a server; expected the data. Download it again"
    return None


def first_damaged_file(directory: Path) -> str | None:
    """Return the path and the cause of the first file of a checkpoint directory that is visibly damaged, or None."""
    for file in sorted(directory.iterdir()):
        if file.is_file() and file.suffix in _SUFFIXES and (cause := cause_of_damage(file)):
            return f"{file} is damaged: {cause}"
    return None


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(512)


def _short_safetensors(file: Path, head: bytes, size: int) -> str | None:
    """Return the cause for a file of safetensors that is shorter than its header says."""
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else size
    if 8 + length > size:
        return f"cut off or no safetensors ({size} bytes); expected the complete file. Copy or save it there again"
    with file.open("rb") as stream:
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError):
            return "no safetensors; expected the complete file. Copy or save it there again"
    if 8 + length + max(ends, default=0) > size:
        return f"cut off after {size} bytes; expected the complete file. Copy or save it there again"
    return None
