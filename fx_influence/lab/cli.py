"""The command line: ``fx-influence run`` and ``fx-influence report``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers.utils.logging import disable_progress_bar

from fx_influence.interop.rewards import RewardError
from fx_influence.lab.plan import EntropyInfluencePlan, read_plan
from fx_influence.lab.results import load_run
from fx_influence.lab.run import run
from fx_influence.lab.table import print_run, printable
from fx_influence.types import IdentityError

WIDTH = 160


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 refused or bad input, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    disable_progress_bar()
    try:
        if arguments.command == "report":
            print_run(load_run(arguments.directory), _console())
        else:
            _run(arguments)
    except (ValueError, OSError, TypeError, ImportError, IdentityError, RewardError) as error:
        print(f"fx-influence: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fx-influence: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fx-influence",
        description="Which rollouts and tokens of an optimizer step change a model's entropy, and by how much.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="sample, attribute, check, store and print one step")
    command.add_argument("plan", nargs="?", type=Path, help="a YAML plan (default: the embedded demo)")
    command.add_argument("--out", type=Path, help="run directory (default: runs/ and the plan's name)")
    command.add_argument("--seed", type=int, help="instead of the plan's seed")
    command = commands.add_parser("report", help="print a finished run again")
    command.add_argument("directory", type=Path, help="a run directory")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    plan = EntropyInfluencePlan() if arguments.plan is None else read_plan(arguments.plan, EntropyInfluencePlan)
    if arguments.seed is not None:
        plan = dataclasses.replace(plan, seed=arguments.seed)
    out = arguments.out or Path("runs") / ("demo" if arguments.plan is None else arguments.plan.stem)
    with _progress() as progress:
        results = run(plan, out, progress)
    print_run(results, _console())


def _console() -> Console:
    # Where the output is no terminal, rich would fold its tables to 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


class _Bars:
    """One progress bar a phase, on standard error."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase)
        self._bars.update(self._tasks[phase], completed=done, total=total)


@contextmanager
def _progress() -> Iterator[_Bars]:
    columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield _Bars(bars)


if __name__ == "__main__":
    sys.exit(main())
