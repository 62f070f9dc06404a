"""The processes of one job: what each of them does for all, and what all of them know.

Values travel as pickles through the processors' memory (gloo), whatever device the work is done on: what is sent is
small beside it, two processes may share a device, and a process that dies is noticed by those that wait for it.
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
"""How long a process waits for another that is not known to have ended: longer than any piece of a run takes."""

GRACE = timedelta(seconds=5)
"""How long a process that is about to end waits: for another to say why, or for the launcher to see who ended first."""

USER_ERRORS = (ValueError, OSError, TypeError, ImportError, IdentityError, RewardError)
"""Errors that tell the user what to do about them; every other one is a fault of the program."""

FROM_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LostRankError(RuntimeError):
    """Another process of the job has ended, so that nobody will answer."""


@dataclass(frozen=True)
class Job:
    """This process among those of a job, numbered from 0; alone, unless it has a ``group``.

    Every method is called by all processes, in the same order. One that waits for a process which has ended raises
    ``LostRankError``, within moments where its end closed the connection and else after ``TIMEOUT``.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    store: Store | None = None

    @property
    def local_rank(self) -> int:
        """This process's number among those of its machine."""
        return int(os.environ.get("LOCAL_RANK", self.rank))

    def on_rank0(self, work: Callable[[], Value]) -> Value:
        """What ``work`` gives on rank 0, which alone does it; what it raises there is raised on all."""
        if self.group is None:
            return work()
        value, error = None, None
        if self.rank == 0:
            try:
                value = work()
            except Exception as raised:
                error = raised
        value, told = self._broadcast([value, picklable_error(error)])
        try:
            if told:
                raise error or told
        finally:
            # An error and the frame that raised it would keep each other, and the group's threads with them.
            del error, told
        return cast(Value, value)

    def raise_on_all(self, work: Callable[[], Value]) -> Value:
        """What ``work`` gives on this rank; where it is refused on any, it is on all, with the words of the lowest."""
        if self.group is None:
            return work()
        error = None
        try:
            value = work()
        except USER_ERRORS as raised:
            error = raised
        told = next((found for found in self._gather(picklable_error(error)) if found), None)
        try:
            if told:
                raise told from error
        finally:
            del error, told
        return value

    def all_gather(self, work: Callable[[], Value]) -> list[Value]:
        """What ``work`` gives on every rank, in their order; refused as by ``raise_on_all``."""
        return self._gather(self.raise_on_all(work))

    def map_tasks(
        self,
        works: Sequence[Callable[[], Value]],
        kept: MutableMapping[int, Value] | None = None,
        done: Callable[[int], object] = lambda count: None,
    ) -> list[Value]:
        """The pieces that ``works`` make, dealt to the ranks in turn; those that ``kept`` holds by number are not made.

        ``kept`` is given every further piece once the ranks have made one each, and ``done`` the number of pieces that
        there are, from the first on. A work must not wait for other ranks.

        Example:
            >>> kept = {1: "kept"}
            >>> SINGLE_PROCESS.map_tasks([lambda: "a", lambda: "b", lambda: "c"], kept, print), kept
            0
            2
            3
            (['a', 'kept', 'c'], {1: 'kept', 0: 'a', 2: 'c'})
        """
        kept = {} if kept is None else kept
        missing = [k for k in range(len(works)) if k not in kept]
        for start in range(0, len(missing), self.size):
            done(missing[start])
            now = missing[start : start + self.size]
            own = [works[k] for k in now[self.rank : self.rank + 1]]
            made = self.all_gather(partial(_each_called, own))
            for k, piece in zip(now, (piece for some in made for piece in some), strict=True):
                kept[k] = piece
        done(len(works))
        return [kept[k] for k in range(len(works))]

    def broadcast_tensors(self, read: Callable[[], Params]) -> Params:
        """``on_rank0`` for what is as large as a model: one tensor at a time, on the CPU."""
        if self.group is None:
            return read()
        held: Params = {}

        def layout() -> dict[str, tuple[torch.Size, torch.dtype]]:
            held.update(read())
            return {name: (x.shape, x.dtype) for name, x in held.items()}

        for name, (shape, dtype) in self.on_rank0(layout).items():
            tensor = held[name] if self.rank == 0 else torch.empty(shape, dtype=dtype)
            with _in_touch():
                dist.broadcast(tensor, dist.get_global_rank(self.group, 0), self.group)
            held[name] = tensor
        return held

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` on every rank where two differ in a fact, naming it as ``update.num_prompts``."""
        everyone = self._gather(dict(_flat(facts)))
        for rank, theirs in enumerate(everyone):
            for name in everyone[0] | theirs:
                ours, other = everyone[0].get(name), theirs.get(name)
                if ours != other:
                    raise ValueError(
                        f"{name} is {reprlib.repr(ours)} on rank 0 and {reprlib.repr(other)} on rank {rank}; give "
                        "every process the same plan, files and versions"
                    )

    def print_once(self, text: str, say: Callable[[str], object]) -> None:
        """Call ``say`` in the first process that comes with this text; the others, which may end first, wait for it.

        The one method that not all processes need to call.
        """
        if self.store is None:
            say(text)
            return
        key = hashlib.sha256(text.encode()).hexdigest()
        # Without an answer the launcher, which holds the store, or whoever was to speak has ended.
        with suppress(RuntimeError):
            if self.store.add(key, 1) > 1:
                self.store.wait([f"{key} said"], GRACE)
                return
        say(text)
        with suppress(RuntimeError):
            self.store.set(f"{key} said", "")

    def _gather(self, value: Value) -> list[Value]:
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        with _in_touch():
            dist.all_gather_object(found, value, self.group)
        return found

    def _broadcast(self, values: list[Any]) -> list[Any]:
        assert self.group is not None
        with _in_touch():
            dist.broadcast_object_list(values, dist.get_global_rank(self.group, 0), self.group)
        return values


SINGLE_PROCESS = Job()


def is_launched() -> bool:
    """Whether torchrun, or another launcher that sets what it sets, has started this process as one of several."""
    return all(name in os.environ for name in FROM_LAUNCHER) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def join_job() -> Iterator[Job]:
    """The processes of the job that this one belongs to, or ``SINGLE_PROCESS``; all of them enter this.

    Where the caller has started a process group already, the job is that group's.
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
        # A torch may be built without it.
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
def _in_touch() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            "another process of the run has ended, or cannot be reached; the same command continues with what is stored"
        ) from error


def picklable_error(error: Exception | None) -> Exception | None:
    """The error itself where it survives pickling, else its words."""
    if error is None:
        return None
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return ValueError(f"{type(error).__name__}: {error}")


def _each_called(works: Sequence[Callable[[], Value]]) -> list[Value]:
    return [work() for work in works]


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
