"""The files of a run directory: each complete or absent, with damage detected when they are read."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fx_influence.interop.rollouts.native_format import read_native_rollouts, to_json_lines
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.job import SINGLE_PROCESS, Job
from fx_influence.types import Params

PLAN, ENVIRONMENT, SUMMARY = "plan.yaml", "environment.json", "summary.json"
SEQUENCES, BASELINE = "update_sequences.jsonl", "baseline.safetensors"
UPDATE_ROLLOUTS, UPDATE_TOKENS = "update_rollouts.jsonl", "update_tokens.npz"
SUMS = "SHA256SUMS"
GRADIENT = "step_gradient.safetensors"
"""Gradient of the update batch, stored while a run lasts."""
FAILED = "failed.json"
"""File that says why a run could not be started; a corrected plan may use its directory."""
READER_ERRORS = (zipfile.BadZipFile, yaml.YAMLError, SafetensorError)
"""Errors of file readers that are not a ``ValueError``."""
ANNOTATED = (SUMMARY, SEQUENCES, "_top.jsonl")
"""Endings of reports that people may annotate once a run is finished: they need only fit the arrays."""


class RunDirectoryError(ValueError):
    """Raised for a directory that cannot hold, or does not hold, the run that was asked for."""


def eval_file(index: int, suffix: str) -> str:
    """Return the file name of an output of one evaluation, such as ``eval_00.npz``."""
    return f"eval_{index:02d}{suffix}"


class RunFiles:
    """The files of one run by name; the README describes their contents.

    A file counts once its SHA-256 is in ``SHA256SUMS``, which is written after it: a file that a killed process left
    unfinished counts as absent, and later damage is detected when the file is read. Reports that people may annotate
    are not checked (``ANNOTATED``).

    With several processes, only rank 0 reads and writes, and only it needs to see the directory. All ranks call, all
    receive the values that were read, and an error is raised on all.
    """

    def __init__(self, path: Path, job: Job = SINGLE_PROCESS) -> None:
        self.path, self.job = path, job

    def has(self, name: str) -> bool:
        """Return whether the file exists and counts."""
        return self.job.on_rank0(lambda: (self.path / name).is_file() and (name == SUMMARY or name in self._sums()))

    def was_stored(self, name: str) -> bool:
        """Return whether the file was stored, even if it has been deleted since."""
        return self.job.on_rank0(lambda: name in self._sums())

    def names(self, pattern: str) -> list[str]:
        """Return the names of existing files that match a pattern, stored or not."""
        return self.job.on_rank0(lambda: sorted(file.name for file in self.path.glob(pattern)))

    def remove(self, *names: str) -> None:
        """Delete files that exist, and their checksums."""
        self.job.on_rank0(lambda: self._remove(names))

    def write_text(self, name: str, text: str) -> None:
        """Store a text in UTF-8."""
        self._store(name, lambda file: Path(file).write_text(text, encoding="utf-8"))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Store an object, with null for numbers that are not finite."""
        self.write_text(name, json.dumps(without_nan(value), indent=1, allow_nan=False) + "\n")

    def write_jsonl(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Store one object per line, with null for numbers that are not finite."""
        self.write_text(name, "".join(json.dumps(without_nan(r), allow_nan=False) + "\n" for r in records))

    def write_arrays(self, name: str, arrays: Mapping[str, Any]) -> None:
        """Store arrays by name, compressed."""

        def write(file: str) -> None:
            with open(file, "wb") as handle:
                np.savez_compressed(handle, **arrays)

        self._store(name, write)

    def write_array(self, name: str, array: np.ndarray) -> None:
        """Store one array."""

        def write(file: str) -> None:
            with open(file, "wb") as handle:
                np.save(handle, array)

        self._store(name, write)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors by name, as safetensors."""
        self._store(name, lambda file: save_file({key: x.contiguous().cpu() for key, x in tensors.items()}, file))

    def write_rollouts(self, name: str, rollouts: Sequence[Rollout]) -> None:
        """Store rollouts in this library's format."""
        self.write_text(name, to_json_lines(rollouts))

    def read_yaml(self, name: str) -> Any:
        """Return the value of a YAML file."""
        return yaml.safe_load(self._read(name))

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object of a JSON file."""
        value = json.loads(self._read(name))
        if not isinstance(value, dict):
            raise ValueError(f"{name} holds {type(value).__name__}; expected an object")
        return value

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        """Return the objects of a file of JSON lines."""
        return [json.loads(line) for line in self._read(name).decode("utf-8").split("\n") if line]

    def read_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Return stored arrays by name; nothing is unpickled."""
        with np.load(io.BytesIO(self._read(name)), allow_pickle=False) as arrays:
            return dict(arrays)

    def read_array(self, name: str) -> np.ndarray:
        """Return one stored array; nothing is unpickled."""
        array: np.ndarray = np.load(io.BytesIO(self._read(name)), allow_pickle=False)
        return array

    def read_tensors(self, name: str) -> Params:
        """Return stored tensors by name."""

        def read() -> Params:
            self._check(name, sha256(self.path / name))
            return load_file(self.path / name)

        return self.job.broadcast_tensors(read)

    def read_rollouts(self, name: str) -> list[Rollout]:
        """Return stored rollouts."""

        def read() -> list[Rollout]:
            self._check(name, sha256(self.path / name))
            return read_native_rollouts(self.path / name)

        return self.job.on_rank0(read)

    def _read(self, name: str) -> bytes:
        def read() -> bytes:
            data = (self.path / name).read_bytes()
            self._check(name, hashlib.sha256(data).hexdigest())
            return data

        return self.job.on_rank0(read)

    def _check(self, name: str, digest: str) -> None:
        if not name.endswith(ANNOTATED) and self._sums().get(name) != digest:
            raise ValueError(f"{name} is not the file that the run stored")

    def _sums(self) -> dict[str, str]:
        if not (self.path / SUMS).is_file():
            return {}
        lines = (self.path / SUMS).read_text(encoding="utf-8").splitlines()
        return {name: value for value, _, name in (line.partition("  ") for line in lines)}

    def _write_sums(self, sums: Mapping[str, str]) -> None:
        # Sorted, so that an interrupted run ends with the same bytes as any other.
        text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
        self._replace(SUMS, lambda file: Path(file).write_text(text, encoding="utf-8"))

    def _remove(self, names: Sequence[str]) -> None:
        present = [name for name in names if (self.path / name).exists()]
        for name in present:
            (self.path / name).unlink()
        if present:
            self._write_sums({name: value for name, value in self._sums().items() if name not in present})

    def _store(self, name: str, write: Callable[[str], object]) -> None:
        def replace() -> None:
            self._replace(name, write)
            # The summary contains times, so its sum would make equal runs differ.
            if name != SUMMARY:
                self._write_sums({**self._sums(), name: sha256(self.path / name)})

        self.job.on_rank0(replace)

    def _replace(self, name: str, write: Callable[[str], object]) -> None:
        temporary = self.path / f".{name}.{os.getpid()}.tmp"
        try:
            write(str(temporary))
            os.replace(temporary, self.path / name)
        except (OSError, SafetensorError) as error:
            raise RunDirectoryError(
                f"{name} could not be written in {str(self.path)!r}: {error}; expected a directory with room for it. "
                "Make room, and the same command continues with the stored results, or choose another --out"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def raise_if_damaged(path: Path) -> Iterator[None]:
    """Raise ``RunDirectoryError`` for errors inside the block that reading a damaged directory causes."""
    try:
        yield
    except RunDirectoryError:
        raise
    except (OSError, ValueError, EOFError, LookupError, TypeError, *READER_ERRORS) as error:
        raise RunDirectoryError(
            f"{str(path)!r} is damaged: {error}; expected the files as they were stored. Run its plan.yaml into "
            "another --out"
        ) from error


def without_nan(value: Any) -> Any:
    """Replace figures that do not exist, such as an error bar from one cluster, by null: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
