"""The progress of long work on standard error: bars in a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from fx_influence.lab.inputs.rollouts import Progress

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def progress_on_stderr(shown: bool) -> Iterator[Progress]:
    """Yield what is to be called with (phase, done, in all); nothing is written unless ``shown``."""
    if shown and not sys.stderr.isatty():
        yield Lines(lambda text: print(text, file=sys.stderr, flush=True))
        return
    columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=Console(stderr=True), disable=not shown) as bars:
        yield _Bars(bars)


class Lines:
    """Progress in plain lines: as a phase begins and as it ends, and between these every half minute at most.

    Example:
        >>> lines = Lines(print, clock=iter([0.0, 0.1, 31.0, 32.0]).__next__)
        >>> for done in (0, 1, 2, 3):
        ...     lines("sampling", done, 3)
        fx-influence: sampling 0/3
        fx-influence: sampling 2/3, 31 s
        fx-influence: sampling 3/3, 32 s
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._phase = ""
        self._began = self._written = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = self._clock()
        if phase != self._phase:
            self._phase, self._began = phase, now
        elif done < total and now - self._written < SECONDS_BETWEEN_LINES:
            return
        self._written = now
        seconds = f", {now - self._began:.0f} s" if now > self._began else ""
        self._write(f"fx-influence: {phase} {done}/{total}{seconds}")


class _Bars:
    """One progress bar a phase."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase)
        self._bars.update(self._tasks[phase], completed=done, total=total)
