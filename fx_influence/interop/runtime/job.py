"""The processes of one job, and how they share work, values and errors.

Values travel as pickles through CPU memory (gloo), whatever device the work is done on: they are small beside the work,
two processes may share a device, and a process that dies is noticed by those that wait for it.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import reprlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist

from fx_influence.interop.scoring import RewardError
from fx_influence.types import IdentityError, Params

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

Value = TypeVar("Value")

TIMEOUT = timedelta(hours=6)
"""Longest wait for another process that is not known to have ended: longer than any task of a run takes."""

GRACE = timedelta(seconds=5)
"""Wait of a process that is about to end: for another to print why, or for the launcher to see which ended first."""

USER_ERRORS = (ValueError, OSError, TypeError, ImportError, IdentityError, RewardError)
"""Errors that tell users what to do about them; every other error is a fault of the program."""

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LostRankError(RuntimeError):
    """Raised when another process of the job has ended, so that it will never answer."""


@dataclass(frozen=True)
class Job:
    """This process among those of a job; a single process unless it has a ``group``.

    Every method is called by all processes, in the same order. One that waits for a process which has ended raises
    ``LostRankError``, within moments if its end closed the connection and else after ``TIMEOUT``.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        group: the processes' gloo group; None for a single process.
        store: the launcher's store; None if the caller started the processes.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    store: Store | None = None

    @property
    def local_rank(self) -> int:
        """Return this process's number among those of its machine."""
        return int(os.environ.get("LOCAL_RANK", self.rank))

    def on_rank0(self, work: Callable[[], Value]) -> Value:
        """Run ``work`` on rank 0 only and return its value on all; an error that it raises is raised on all."""
        if self.group is None:
            return work()
        value, error = None, None
        if self.rank == 0:
            try:
                value = work()
            except Exception as raised:
                error = raised
        value, received = self._broadcast([value, picklable_error(error)])
        try:
            if received:
                raise error or received
        finally:
            # An error and the frame that raised it form a cycle, which would keep the group's threads alive.
            del error, received
        return cast(Value, value)

    def raise_on_all(self, work: Callable[[], Value]) -> Value:
        """Run ``work`` on every rank and return this rank's value; a user's error on any rank is raised on all.

        Every rank raises the error, one of ``USER_ERRORS``, of the lowest rank that failed.
        """
        if self.group is None:
            return work()
        error = None
        try:
            value = work()
        except USER_ERRORS as raised:
            error = raised
        first_error = next((e for e in self._gather(picklable_error(error)) if e), None)
        try:
            if first_error:
                raise first_error from error
        finally:
            del error, first_error
        return value

    def all_gather(self, work: Callable[[], Value]) -> list[Value]:
        """Return the values of ``work`` on every rank, in their order; errors as in ``raise_on_all``."""
        return self._gather(self.raise_on_all(work))

    def map_tasks(
        self,
        tasks: Sequence[Callable[[], Value]],
        cache: MutableMapping[int, Value] | None = None,
        on_progress: Callable[[int], object] = lambda count: None,
    ) -> list[Value]:
        """Return the results of all tasks, which the ranks run in turn; cached tasks are not run.

        Args:
            tasks: functions that must not wait for other ranks.
            cache: results by index of the task; every further result is added once each rank has one.
            on_progress: called with the number of results that exist, from the first round on.

        Example:
            >>> cache = {1: "cached"}
            >>> SINGLE_PROCESS.map_tasks([lambda: "a", lambda: "b", lambda: "c"], cache, print), cache
            0
            2
            3
            (['a', 'cached', 'c'], {1: 'cached', 0: 'a', 2: 'c'})
        """
        cache = {} if cache is None else cache
        missing = [k for k in range(len(tasks)) if k not in cache]
        for start in range(0, len(missing), self.size):
            on_progress(missing[start])
            round_indices = missing[start : start + self.size]
            local_tasks = [tasks[k] for k in round_indices[self.rank : self.rank + 1]]
            results_by_rank = self.all_gather(partial(_call_each, local_tasks))
            results = (result for rank_results in results_by_rank for result in rank_results)
            for k, result in zip(round_indices, results, strict=True):
                cache[k] = result
        on_progress(len(tasks))
        return [cache[k] for k in range(len(tasks))]

    def broadcast_tensors(self, read: Callable[[], Params]) -> Params:
        """Run ``read`` on rank 0 and return its tensors on all ranks, on the CPU.

        They are sent one at a time, for values of the size of a model.
        """
        if self.group is None:
            return read()
        tensors: Params = {}

        def layout() -> dict[str, tuple[torch.Size, torch.dtype]]:
            tensors.update(read())
            return {name: (x.shape, x.dtype) for name, x in tensors.items()}

        for name, (shape, dtype) in self.on_rank0(layout).items():
            tensor = tensors[name] if self.rank == 0 else torch.empty(shape, dtype=dtype)
            with _lost_rank_errors():
                dist.broadcast(tensor, dist.get_global_rank(self.group, 0), self.group)
            tensors[name] = tensor
        return tensors

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` on every rank if two differ in a fact, naming it as ``update.num_prompts``."""
        facts_by_rank = self._gather(dict(_flat(facts)))
        for rank, rank_facts in enumerate(facts_by_rank):
            for name in facts_by_rank[0] | rank_facts:
                expected, actual = facts_by_rank[0].get(name), rank_facts.get(name)
                if expected != actual:
                    raise ValueError(
                        f"{name} is {reprlib.repr(expected)} on rank 0 and {reprlib.repr(actual)} on rank {rank}; "
                        "expected the same. Give every process the same plan, files and versions"
                    )

    def print_once(self, text: str, output: Callable[[str], object]) -> None:
        """Call ``output`` in the first process that arrives with this text; the others wait until it has printed.

        Without the wait, one that ends first would make the launcher end the process that prints. This is the only
        method that not all processes need to call.
        """
        if self.store is None:
            output(text)
            return
        key = hashlib.sha256(text.encode()).hexdigest()
        # The store raises if the launcher, which holds it, has ended, or if the printing process does not answer.
        with suppress(RuntimeError):
            if self.store.add(key, 1) > 1:
                self.store.wait([f"{key} printed"], GRACE)
                return
        output(text)
        with suppress(RuntimeError):
            self.store.set(f"{key} printed", "")

    def _gather(self, value: Value) -> list[Value]:
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        with _lost_rank_errors():
            dist.all_gather_object(values, value, self.group)
        return values

    def _broadcast(self, values: list[Any]) -> list[Any]:
        assert self.group is not None
        with _lost_rank_errors():
            dist.broadcast_object_list(values, dist.get_global_rank(self.group, 0), self.group)
        return values


SINGLE_PROCESS = Job()


def is_launched() -> bool:
    """Return whether torchrun, or a launcher that sets the same variables, started this process as one of several."""
    return all(name in os.environ for name in LAUNCHER_VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def join_job() -> Iterator[Job]:
    """Yield the job that this process belongs to, or ``SINGLE_PROCESS``; all of its processes enter this.

    If the caller has started a process group already, the job is that group's.
    """
    if dist.is_available() and dist.is_initialized():
        if dist.get_world_size() == 1:
            yield SINGLE_PROCESS
            return
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        try:
            yield Job(dist.get_rank(), dist.get_world_size(), group)
        finally:
            dist.destroy_process_group(group)
    elif is_launched():
        # torch may be built without torch.distributed.
        from torch.distributed.rendezvous import rendezvous

        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        try:
            yield Job(rank, size, dist.group.WORLD, store)
        finally:
            dist.destroy_process_group()
    else:
        yield SINGLE_PROCESS


@contextmanager
def _lost_rank_errors() -> Iterator[None]:
    """Raise ``LostRankError`` for the errors with which gloo reports a process that has ended."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            "another process of the run has ended or cannot be reached; expected all processes until the end. The same "
            "command continues with the stored results"
        ) from error


def picklable_error(error: Exception | None) -> Exception | None:
    """Return the error itself if it survives pickling, else a ``ValueError`` with its type and message."""
    if error is None:
        return None
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return ValueError(f"{type(error).__name__}: {error}")


def _call_each(tasks: Sequence[Callable[[], Value]]) -> list[Value]:
    """Return the results of tasks."""
    return [task() for task in tasks]


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with dotted names."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
