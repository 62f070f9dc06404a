"""Rollout files: which ones a directory holds, and their lines, compressed or not."""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fx_influence.interop.checkpoints.files.damage import cause_of_substitution

COMPRESSED = (".gz", ".zst")
SUFFIXES = (".jsonl", ".parquet", ".pt", ".json")

_SUMMARIES = re.compile(
    r"aggregated_results\.jsonl|batch_summary\.json|.*_metadata\.jsonl|metadata\.json(l)?|config\.json"
)
"""Names of files beside rollouts that hold none: of SkyRL, rllm, open-instruct and verifiers."""


def suffix(path: Path) -> str:
    """Return the last suffix of a file's name that is not of a compression.

    Example:
        >>> suffix(Path("5.jsonl.gz"))
        '.jsonl'
    """
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def rollout_files(path: Path) -> list[Path]:
    """Return the file, or the files of a directory in the order of the numbers in their names.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: for a directory with files of several suffixes.
    """
    if path.is_file():
        return [path]
    entries = path.iterdir() if path.is_dir() else iter(())
    files = [f for f in entries if f.is_file() and suffix(f) in SUFFIXES and not _SUMMARIES.fullmatch(f.name)]
    if not files:
        raise FileNotFoundError(
            f"rollouts file {str(path)!r} does not exist; expected a file, or a directory of rank_*.jsonl or other "
            "rollout files. Check the path"
        )
    suffixes = sorted({suffix(file) for file in files})
    if len(suffixes) > 1:
        raise ValueError(
            f"rollouts directory {str(path)!r} has files that end in {', '.join(suffixes)}; expected one kind. Pass "
            "the file, or a directory of its own"
        )
    return sorted(files, key=_order)


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, decompressed.

    Raises:
        ImportError: for ``.zst`` without the package zstandard.
        ValueError: for a damaged compressed file, and for a pointer of git-lfs or a page of HTML in place of a file.
    """
    refuse_substitution(path)
    # Bytes: text mode would also split at a lone carriage return, and fail at the first bad byte of the file.
    with _opened(path) as file:
        try:
            yield from file
        except (EOFError, OSError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); expected a complete compressed file. Copy it there again"
            ) from error


def refuse_substitution(path: Path) -> None:
    """Raise ``ValueError`` for a file that a pointer of git-lfs or a page of HTML stands in for."""
    if cause := cause_of_substitution(path):
        raise ValueError(f"{path} is damaged: {cause}")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    if path.suffix == ".gz":
        with gzip.open(path, "rb") as unzipped:
            yield io.BufferedReader(unzipped)
    elif path.suffix == ".zst":
        with open(path, "rb") as raw:
            yield _zstandard(path, raw)
    else:
        with open(path, "rb") as file:
            yield file


def _zstandard(path: Path, raw: IO[bytes]) -> IO[bytes]:
    """Return the decompressed file."""
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            f"{path} is compressed by zstandard, and reading it needs the package: pip install zstandard; or "
            f"decompress it first: zstd -d {path.name}"
        ) from error
    reader: Any = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    return io.BufferedReader(reader)


def _order(path: Path) -> list[tuple[int, str]]:
    """Return a key by which file 10 comes after file 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]
