"""Store one run per directory, so that an interrupted run can continue."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.environment import environment
from fx_influence.interop.runtime.job import SINGLE_PROCESS, Job
from fx_influence.interop.runtime.run_files import (
    ENVIRONMENT,
    FAILED,
    GRADIENT,
    PLAN,
    SUMMARY,
    SUMS,
    UPDATE_ROLLOUTS,
    RunDirectoryError,
    RunFiles,
    raise_if_damaged,
)
from fx_influence.lab.plan import StepPlan
from fx_influence.lab.plan.errors import PlanError
from fx_influence.lab.plan.files import plan_text

Result = TypeVar("Result")


class RunDirectory(RunFiles):
    """The files of one run, which may be under way."""

    @classmethod
    def start(cls, path: Path, plan: StepPlan, inputs: Mapping[str, str], job: Job = SINGLE_PROCESS) -> RunDirectory:
        """Make the directory, or continue in it.

        Args:
            path: of the directory.
            plan: of the run.
            inputs: SHA-256 by name of the files that the plan reads; a run that began with others is not continued.
            job: the processes of the run, of which the first alone writes.

        Raises:
            RunDirectoryError: if the directory holds anything but a run of this plan.
        """
        job.on_rank0(lambda: cls(path)._begin(plan, inputs))
        return cls(path, job)

    def check_open_to(self, plan: StepPlan) -> None:
        """Raise ``RunDirectoryError`` unless this plan's run may be stored in the directory.

        It may if the directory is absent or empty, or holds part of the same run, or a start that failed.
        """
        path = self.path
        if self.has(PLAN):
            with raise_if_damaged(path):
                stored = self.read_yaml(PLAN)
            if not _is_plan(stored, plan) and not self._only_failed():
                raise RunDirectoryError(
                    f"{str(path)!r} holds a run of another plan; expected one of this plan, or nothing. Choose "
                    "another --out or remove it"
                )
        elif path.exists() and not (path.is_dir() and _only_begun({file.name for file in path.iterdir()})):
            raise RunDirectoryError(
                f"{str(path)!r} exists and is not a run directory; expected one, or nothing. Choose another --out"
            )
        if not self.has(SUMMARY):
            existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
            if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
                raise RunDirectoryError(
                    f"{str(path)!r} cannot be written: expected a directory that you may write to, not "
                    f"{str(existing)!r}. Choose another --out"
                )

    def note_failure(self, error: Exception) -> None:
        """Record that the run could not be started, so that a corrected plan may use the directory.

        Nothing is recorded once U's step is measured, or for an error of the directory itself.
        """
        if not isinstance(error, RunDirectoryError) and not self.has(GRADIENT):
            with suppress(RunDirectoryError):
                self.write_json(FAILED, {"error": f"{type(error).__name__}: {error}"})

    def _begin(self, plan: StepPlan, inputs: Mapping[str, str]) -> None:
        self.check_open_to(plan)
        path = self.path
        if self.has(PLAN):
            if self.has(SUMMARY):
                return
            if not self._must_restart(plan, inputs):
                self._check_inputs(inputs)
                self.remove(FAILED)
                for leftover in path.glob(".*.tmp"):
                    leftover.unlink(missing_ok=True)
                return
            self.remove(*self._sums())
        path.mkdir(parents=True, exist_ok=True)
        self.write_json(ENVIRONMENT, {**environment(), "inputs_sha256": dict(inputs)})
        self.write_text(PLAN, plan_text(plan))

    def _only_failed(self) -> bool:
        """Return whether the directory holds nothing but the files of a start that failed."""
        names = {file.name for file in self.path.iterdir() if not file.name.endswith(".tmp")}
        return self.has(FAILED) and names <= {SUMS, *self._sums()}

    def _must_restart(self, plan: StepPlan, inputs: Mapping[str, str]) -> bool:
        """Return whether the directory holds a start that failed, from which this run cannot continue.

        With the same plan and files it can continue from the rollouts sampled so far. Where all of U was stored,
        however, it was U that was refused, as where its rewards are all the same, and U must be sampled again.
        """
        if not self._only_failed():
            return False
        with raise_if_damaged(self.path):
            stored, before = self.read_yaml(PLAN), self.read_json(ENVIRONMENT)["inputs_sha256"]
        return not _is_plan(stored, plan) or before != dict(inputs) or self.has(UPDATE_ROLLOUTS)

    def _check_inputs(self, inputs: Mapping[str, str]) -> None:
        with raise_if_damaged(self.path):
            before = self.read_json(ENVIRONMENT)["inputs_sha256"]
        for name in sorted({*before, *inputs}):
            if before.get(name) != inputs.get(name):
                raise RunDirectoryError(
                    f"{name} has changed since the run in {str(self.path)!r} began; expected the file that it "
                    "began with. Put it back, or choose another --out"
                )

    @classmethod
    def finished(cls, path: str | Path, *names: str) -> RunDirectory:
        """Return the directory of a finished run.

        Args:
            path: of the directory.
            names: files that it must have beside those of every run.

        Raises:
            RunDirectoryError: naming the file that is missing.
        """
        directory = cls(Path(path))
        for name in (PLAN, ENVIRONMENT, SUMMARY, UPDATE_ROLLOUTS, *names):
            if not directory.has(name):
                raise RunDirectoryError(
                    f"{str(path)!r} has no {name}; expected a finished run of that kind. Finish it with the "
                    "command that began it, or check the path"
                )
        return directory

    def partial_arrays(self, prefix: str) -> PartialResults[dict[str, np.ndarray]]:
        """Return the partial results ``prefix_00000.npz``, ... as a mapping."""
        return PartialResults(self, prefix, ".npz", self.read_arrays, self.write_arrays)

    def partial_rollouts(self, prefix: str) -> PartialResults[Sequence[Rollout]]:
        """Return the partial results ``prefix_00000.jsonl``, ... as a mapping."""
        return PartialResults(self, prefix, ".jsonl", self.read_rollouts, self.write_rollouts)


def _is_plan(stored: Any, plan: StepPlan) -> bool:
    """Return whether ``stored`` is ``plan`` as plain values.

    Fields that are newer than the stored plan have their defaults; those of version 0.1 have their present names.
    """
    try:
        return type(plan).from_dict(stored) == plan
    except PlanError:
        return False


def _only_begun(names: set[str]) -> bool:
    """Return whether a directory is empty, or left by a process that was killed while it made the directory.

    A directory with nothing but a plan is the user's.
    """
    rest = {name for name in names if not name.endswith(".tmp")}
    return rest <= {ENVIRONMENT, SUMS, PLAN} and (ENVIRONMENT in rest or not rest)


class PartialResults(MutableMapping[int, Result], Generic[Result]):
    """Results of the tasks of a long computation, by number: files of a run directory until all are done."""

    def __init__(
        self,
        directory: RunDirectory,
        prefix: str,
        suffix: str,
        read: Callable[[str], Result],
        write: Callable[[str, Result], None],
    ) -> None:
        self._directory, self._prefix, self._suffix = directory, prefix, suffix
        self._read, self._write = read, write

    def __getitem__(self, key: int) -> Result:
        if not self._directory.has(self._name(key)):
            raise KeyError(key)
        with raise_if_damaged(self._directory.path / self._name(key)):
            return self._read(self._name(key))

    def __setitem__(self, key: int, result: Result) -> None:
        self._write(self._name(key), result)

    def __delitem__(self, key: int) -> None:
        self._directory.remove(self._name(key))

    def __iter__(self) -> Iterator[int]:
        files = self._directory.names(f"{self._prefix}_*{self._suffix}")
        return iter(sorted(int(file.removesuffix(self._suffix).rpartition("_")[2]) for file in files))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def clear(self) -> None:
        """Delete all of them."""
        self._directory.remove(*map(self._name, self))

    def _name(self, key: int) -> str:
        return f"{self._prefix}_{key:05d}{self._suffix}"
