"""Carry out the commands of ``fx-influence``: ``run``, ``fisher``, ``report``, ``bundle``, ``watch``, ``analyze``."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from fx_influence.core.display import printable
from fx_influence.interop.ledger.file import LEDGER
from fx_influence.interop.runtime.job import GRACE, USER_ERRORS, Job, LostRankError, is_launched, join_job
from fx_influence.lab.analysis.analyze import print_analysis, write_analysis
from fx_influence.lab.console.run_tables import print_run
from fx_influence.lab.console.training_tables import print_training
from fx_influence.lab.experiment.entropy import run
from fx_influence.lab.experiment.progress import progress_on_stderr
from fx_influence.lab.fisher.results import UPDATE_SELF_KERNEL, load_fisher_run
from fx_influence.lab.fisher.run import run_fisher
from fx_influence.lab.fisher.table import print_fisher
from fx_influence.lab.plan import AnyPlan, EntropyInfluencePlan, FisherKernelPlan, read_plan
from fx_influence.lab.plan.files import print_note
from fx_influence.lab.report import write_bundle, write_report, write_training_report
from fx_influence.lab.results import EntropyInfluenceResults, load_run
from fx_influence.lab.training.load import load_training
from fx_influence.lab.training.watch import watch_training

WIDTH = 160
"""Columns of tables where the output is not a terminal."""


def run_command(arguments: argparse.Namespace) -> int:
    """Carry out the command in ``arguments``, in every process of a job, and return the exit status."""
    disable_progress_bar()
    if not is_launched():
        return _run_command(arguments)
    from torch.distributed.elastic.multiprocessing.errors import record

    # Errors other than the user's then appear in the launcher's report.
    return record(_run_command)(arguments) or 0


def _run_command(arguments: argparse.Namespace) -> int:
    with join_job() as job:
        try:
            COMMANDS[arguments.command](arguments, job)
        except BrokenPipeError:
            raise
        except USER_ERRORS as error:
            return _report_end(job, one_line(error), 1)
        except LostRankError as error:
            status = _report_end(job, str(error), 1)
            # The launcher ends all processes when one has ended, and its report blames the first that did, which
            # must not be this one.
            time.sleep(GRACE.total_seconds())
            return status
        except KeyboardInterrupt:
            return _report_end(job, "interrupted; the same command continues where it stopped", 130)
    return 0


def one_line(error: Exception) -> str:
    """Return an error as one printable line; an error of the operating system names the file and what to check.

    Example:
        >>> one_line(PermissionError(13, "Permission denied", "runs"))
        "'runs' cannot be used: Permission denied; check the path and its permissions"
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{str(error.filename)!r} cannot be used: {error.strerror}; check the path and its permissions"
    else:
        text = str(error) or type(error).__name__
    return printable(re.sub(r"\s*\n\s*", " ", text.strip()))


def _report_end(job: Job, message: str, status: int) -> int:
    job.print_once(message, lambda text: print(f"fx-influence: {text}", file=sys.stderr, flush=True))
    return status


def _run(arguments: argparse.Namespace, job: Job) -> None:
    plan, out = job.raise_on_all(lambda: _read_plan(arguments, EntropyInfluencePlan, job))
    with progress_on_stderr(job.rank == 0) as progress:
        results = run(plan, out, progress)
    job.on_rank0(lambda: _print_and_write_page(results))


def _print_and_write_page(results: EntropyInfluenceResults) -> None:
    print_run(results, _console())
    try:
        _write_page(results)
    except ImportError as error:
        # The run is finished and stored, so a package that only the page needs does not make it fail.
        print(f"no page: {error}", file=sys.stderr)


def _fisher(arguments: argparse.Namespace, job: Job) -> None:
    plan, out = job.raise_on_all(lambda: _read_plan(arguments, FisherKernelPlan, job))
    with progress_on_stderr(job.rank == 0) as progress:
        results = run_fisher(plan, out, progress)
    job.on_rank0(lambda: print_fisher(results, _console()))


def _report(arguments: argparse.Namespace, job: Job) -> None:
    job.on_rank0(lambda: _print_stored(arguments))


def _print_stored(arguments: argparse.Namespace) -> None:
    if (arguments.directory / UPDATE_SELF_KERNEL).is_file():
        print_fisher(load_fisher_run(arguments.directory), _console())
    elif (arguments.directory / LEDGER).is_file():
        training = load_training(arguments.directory)
        print_training(training, _console())
        _print_page("The page of the training run", write_training_report(training))
    else:
        results = load_run(arguments.directory)
        print_run(results, _console())
        _write_page(results)


def _write_page(results: EntropyInfluenceResults) -> None:
    _print_page("The page with every rollout and token", write_report(results))


def _print_page(title: str, page: Path) -> None:
    _console().print(Text(f"{title}: {printable(str(page))}"), soft_wrap=True)


def _bundle(arguments: argparse.Namespace, job: Job) -> None:
    job.on_rank0(lambda: _print_page("The bundle", write_bundle(arguments.directory, arguments.out)))


def _watch(arguments: argparse.Namespace, job: Job) -> None:
    job.on_rank0(lambda: _follow(arguments))


def _follow(arguments: argparse.Namespace) -> None:
    try:
        watch_training(arguments.directory, _console(), arguments.once)
    except KeyboardInterrupt:
        # The way to end it, and nothing is left undone.
        return


def _analyze(arguments: argparse.Namespace, job: Job) -> None:
    job.on_rank0(lambda: _print_analyses(arguments))


def _print_analyses(arguments: argparse.Namespace) -> None:
    for analysis in write_analysis(load_run(arguments.directory)):
        print_analysis(analysis, _console())


COMMANDS: dict[str, Callable[[argparse.Namespace, Job], None]] = {
    "run": _run,
    "fisher": _fisher,
    "report": _report,
    "bundle": _bundle,
    "watch": _watch,
    "analyze": _analyze,
}
"""Functions that carry out the commands, by name."""


def _read_plan(arguments: argparse.Namespace, plan_type: type[AnyPlan], job: Job) -> tuple[AnyPlan, Path]:
    """Return the plan that the command names, the embedded demo's without one, and the run directory."""
    note = print_note if job.rank == 0 else _no_note
    plan = plan_type() if arguments.plan is None else read_plan(arguments.plan, plan_type, note)
    if arguments.seed is not None:
        plan = dataclasses.replace(plan, seed=arguments.seed)
    name = "demo" if arguments.plan is None else arguments.plan.stem
    return plan, arguments.out or Path("runs") / f"{name}{arguments.suffix}"


def _no_note(text: str) -> None:
    """Print nothing: the notes of ranks other than 0."""


def _console() -> Console:
    # Where the output is not a terminal, rich would fold its tables to 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)
