"""Show the progress of long work on standard error: bars in a terminal, a line now and then anywhere else."""

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
def progress_on_stderr(enabled: bool) -> Iterator[Progress]:
    """Yield a function to call with (phase, done, total); it writes nothing unless ``enabled``."""
    if enabled and not sys.stderr.isatty():
        yield ProgressLines(lambda text: print(text, file=sys.stderr, flush=True))
        return
    columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=Console(stderr=True), disable=not enabled) as bars:
        yield _ProgressBars(bars)


class ProgressLines:
    """Progress in plain lines: where a phase begins, where it ends, and every half minute at most in between.

    Args:
        write: called with each line.
        clock: seconds, from any origin.

    Example:
        >>> lines = ProgressLines(print, clock=iter([0.0, 0.1, 31.0, 32.0]).__next__)
        >>> for done in (0, 1, 2, 3):
        ...     lines("sampling", done, 3)
        fx-influence: sampling 0/3
        fx-influence: sampling 2/3, 31 s
        fx-influence: sampling 3/3, 32 s
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._phase = ""
        self._phase_start = self._last_line = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = self._clock()
        if phase != self._phase:
            self._phase, self._phase_start = phase, now
        elif done < total and now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        seconds = f", {now - self._phase_start:.0f} s" if now > self._phase_start else ""
        self._write(f"fx-influence: {phase} {done}/{total}{seconds}")


class _ProgressBars:
    """Progress as one bar per phase."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase)
        self._bars.update(self._tasks[phase], completed=done, total=total)
