"""Append measured steps to the ledger of a training run, and read it at any time.

The ledger is a file of JSON lines, one for each measured step. A line is written by one call at the end of the file and
flushed to the disk, so a reader sees it complete or not: of a process that was killed while it wrote, the last line may
be torn, and it is ignored. A columnar format such as Parquet has its index at the end and cannot be appended to in such
a way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from fx_influence.interop.runtime.run_files import RunDirectoryError, without_nan

LEDGER = "ledger.jsonl"
"""Name of the file in the directory of a training run's measured steps."""

STEP = "step"
"""Field of an entry: number of optimizer steps when its step is done, from 1."""


WINDOW = "window"
"""Field of an entry: the account of the steps up to its own, where a window ends with it."""


def with_window(entry: dict[str, Any], window: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return an entry with the account of the window that its step ends, if it ends one."""
    return entry if window is None else {**entry, WINDOW: dict(window)}


def append_entry(directory: Path, entry: Mapping[str, Any]) -> None:
    """Append one measured step to a ledger, which is made where there is none; return when it is on the disk.

    One process writes to a ledger. A torn last line, left by a process that was killed, is removed first.

    Args:
        directory: of the training run's measured steps.
        entry: values that JSON has, from ``ledger_entry``; figures that are not finite are stored as null.

    Raises:
        ValueError: for an entry whose ``step`` is not a number from 1.
        OSError: where the file cannot be written, as on a full disk; the ledger is then as it was before.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> append_entry(folder, {"step": 1, "figures": {"total": -0.5}})
        >>> read_ledger(folder)
        [{'step': 1, 'figures': {'total': -0.5}}]
    """
    if not _is_step(entry.get(STEP)):
        raise ValueError(f"{STEP} is {entry.get(STEP)!r}; expected a number from 1. Give the optimizer step's number")
    line = json.dumps(without_nan(entry), allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / LEDGER, "ab+", buffering=0) as file:
        end = _end_of_lines(file)
        file.truncate(end)
        written = file.write(line)
        if written != len(line):
            file.truncate(end)
            raise OSError(f"{directory / LEDGER} took {written} of {len(line)} bytes; expected all. Make space on disk")
        os.fsync(file.fileno())


def read_ledger(directory: Path) -> list[dict[str, Any]]:
    """Return the entries of a ledger in the order of their steps, while it is written or afterwards.

    A step that follows a later one in the file is where a training run was resumed: what was written before of it and
    of the steps after it belongs to a continuation that was given up, and is left out.

    Args:
        directory: of the training run's measured steps.

    Raises:
        RunDirectoryError: where there is no ledger, and for a line that is damaged, which is named.
    """
    path = directory / LEDGER
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunDirectoryError(
            f"{str(path)!r} cannot be read: {error.strerror}; expected the ledger of a training run. Name the "
            "directory of its measured steps, by default entropy_influence in the trainer's output_dir"
        ) from error
    entries: list[dict[str, Any]] = []
    # What follows the last newline is a line that is being written, or that a killed process left.
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        entry = _entry(line, path, number)
        while entries and entries[-1][STEP] >= entry[STEP]:
            entries.pop()
        entries.append(entry)
    return entries


def _entry(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not _is_step(entry.get(STEP)):
        raise RunDirectoryError(
            f"line {number} of {str(path)!r} is damaged; expected an object with the number of its {STEP}. Remove the "
            "line to read the others"
        )
    return entry


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _end_of_lines(file: FileIO) -> int:
    """Return the position after the last complete line."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return 0
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1
