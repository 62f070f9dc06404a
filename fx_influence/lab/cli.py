"""The command line: ``fx-influence run``, ``fisher``, ``report`` and ``analyze``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from fx_influence.interop.job import GRACE, REFUSALS, Job, LostRankError, is_launched, launched
from fx_influence.lab.analyze import print_analysis, write_analysis
from fx_influence.lab.fisher import run_fisher
from fx_influence.lab.fisher_results import UPDATE_SELF_KERNEL, load_fisher_run
from fx_influence.lab.fisher_table import print_fisher
from fx_influence.lab.plan import AnyPlan, EntropyInfluencePlan, FisherKernelPlan, read_plan
from fx_influence.lab.report import write_report
from fx_influence.lab.results import EntropyInfluenceResults, load_run
from fx_influence.lab.run import run
from fx_influence.lab.table import print_run, printable

WIDTH = 160


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 refused or bad input, 130 interrupted.

    Started several times by torchrun the processes share the work, and the first prints; a refusal is printed once.
    """
    arguments = _parser().parse_args(argv)
    disable_progress_bar()
    if not is_launched():
        return _carry_out(arguments)
    # Of use under a launcher alone.
    from torch.distributed.elastic.multiprocessing.errors import record

    # What is no refusal is then shown in the launcher's report.
    return record(_carry_out)(arguments) or 0


def _carry_out(arguments: argparse.Namespace) -> int:
    with launched() as job:
        try:
            {"run": _run, "fisher": _fisher, "report": _report, "analyze": _analyze}[arguments.command](arguments, job)
        except REFUSALS as error:
            return _ended(job, printable(str(error)), 1)
        except LostRankError as error:
            status = _ended(job, str(error), 1)
            # The launcher ends all processes when one has ended, and in its report blames the first that did.
            time.sleep(GRACE.total_seconds())
            return status
        except KeyboardInterrupt:
            return _ended(job, "interrupted; the same command continues where it stopped", 130)
    return 0


def _ended(job: Job, message: str, status: int) -> int:
    job.say_once(message, lambda text: print(f"fx-influence: {text}", file=sys.stderr, flush=True))
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fx-influence",
        description="Which rollouts and tokens of an optimizer step change a model's entropy, and by how much.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what, ending in (
        ("run", "sample, attribute, check, store and print one step", ""),
        ("fisher", "how one step's rollouts move the log-probability of others: kernel and prediction", "-fisher"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("plan", nargs="?", type=Path, help="a YAML plan (default: the embedded demo)")
        command.add_argument("--out", type=Path, help=f"run directory (default: runs/ and the plan's name{ending})")
        command.add_argument("--seed", type=int, help="instead of the plan's seed")
        command.set_defaults(ending=ending)
    command = commands.add_parser("report", help="print a finished run again, and write its page report/index.html")
    command.add_argument("directory", type=Path, help="a run directory")
    command = commands.add_parser("analyze", help="what a finished run's influences go with; tables and CSV files")
    command.add_argument("directory", type=Path, help="a run directory; the files go into its folder analysis")
    return parser


def _run(arguments: argparse.Namespace, job: Job) -> None:
    plan, out = job.alike(lambda: _plan(arguments, EntropyInfluencePlan))
    with _progress(job) as progress:
        results = run(plan, out, progress)
    job.first(lambda: _show(results))


def _show(results: EntropyInfluenceResults) -> None:
    print_run(results, _console())
    try:
        _write_page(results)
    except ImportError as error:
        # The run is done and stored: what only the page lacks does not fail it.
        print(f"no page: {error}", file=sys.stderr)


def _fisher(arguments: argparse.Namespace, job: Job) -> None:
    plan, out = job.alike(lambda: _plan(arguments, FisherKernelPlan))
    with _progress(job) as progress:
        results = run_fisher(plan, out, progress)
    job.first(lambda: print_fisher(results, _console()))


def _report(arguments: argparse.Namespace, job: Job) -> None:
    job.first(lambda: _show_stored(arguments))


def _show_stored(arguments: argparse.Namespace) -> None:
    if (arguments.directory / UPDATE_SELF_KERNEL).is_file():
        print_fisher(load_fisher_run(arguments.directory), _console())
    else:
        results = load_run(arguments.directory)
        print_run(results, _console())
        _write_page(results)


def _write_page(results: EntropyInfluenceResults) -> None:
    page = printable(str(write_report(results)))
    _console().print(Text(f"The page with every rollout and token: {page}"), soft_wrap=True)


def _analyze(arguments: argparse.Namespace, job: Job) -> None:
    job.first(lambda: _show_analysis(arguments))


def _show_analysis(arguments: argparse.Namespace) -> None:
    for found in write_analysis(load_run(arguments.directory)):
        print_analysis(found, _console())


def _plan(arguments: argparse.Namespace, kind: type[AnyPlan]) -> tuple[AnyPlan, Path]:
    plan = kind() if arguments.plan is None else read_plan(arguments.plan, kind)
    if arguments.seed is not None:
        plan = dataclasses.replace(plan, seed=arguments.seed)
    name = "demo" if arguments.plan is None else arguments.plan.stem
    return plan, arguments.out or Path("runs") / f"{name}{arguments.ending}"


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
def _progress(job: Job) -> Iterator[_Bars]:
    columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=job.rank > 0) as bars:
        yield _Bars(bars)


if __name__ == "__main__":
    sys.exit(main())
