"""What the command line does once it is known what is asked: ``run``, ``fisher``, ``report`` and ``analyze``."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from fx_influence.interop.runtime.job import GRACE, USER_ERRORS, Job, LostRankError, is_launched, join_job
from fx_influence.lab.analysis.analyze import print_analysis, write_analysis
from fx_influence.lab.console.column_table import printable
from fx_influence.lab.console.run_tables import print_run
from fx_influence.lab.experiment.entropy import run
from fx_influence.lab.experiment.progress import progress_on_stderr
from fx_influence.lab.fisher.results import UPDATE_SELF_KERNEL, load_fisher_run
from fx_influence.lab.fisher.run import run_fisher
from fx_influence.lab.fisher.table import print_fisher
from fx_influence.lab.plan import AnyPlan, EntropyInfluencePlan, FisherKernelPlan
from fx_influence.lab.plan.files import read_plan
from fx_influence.lab.report import write_report
from fx_influence.lab.results import EntropyInfluenceResults, load_run

WIDTH = 160


def carry_out(arguments: argparse.Namespace) -> int:
    """Do what ``arguments`` ask, in every process of a job; returns the exit status."""
    disable_progress_bar()
    if not is_launched():
        return _carry_out(arguments)
    # Of use under a launcher alone.
    from torch.distributed.elastic.multiprocessing.errors import record

    # What is no refusal is then shown in the launcher's report.
    return record(_carry_out)(arguments) or 0


def _carry_out(arguments: argparse.Namespace) -> int:
    with join_job() as job:
        try:
            {"run": _run, "fisher": _fisher, "report": _report, "analyze": _analyze}[arguments.command](arguments, job)
        except BrokenPipeError:
            raise
        except USER_ERRORS as error:
            return _ended(job, one_line(error), 1)
        except LostRankError as error:
            status = _ended(job, str(error), 1)
            # The launcher ends all processes when one has ended, and in its report blames the first that did.
            time.sleep(GRACE.total_seconds())
            return status
        except KeyboardInterrupt:
            return _ended(job, "interrupted; the same command continues where it stopped", 130)
    return 0


def one_line(error: Exception) -> str:
    """Return what an error says in one printable line; of the system's own, which file it is and what to check.

    Example:
        >>> one_line(PermissionError(13, "Permission denied", "runs"))
        "'runs' cannot be used: Permission denied; check the path and its permissions"
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{str(error.filename)!r} cannot be used: {error.strerror}; check the path and its permissions"
    else:
        text = str(error) or type(error).__name__
    return printable(re.sub(r"\s*\n\s*", " ", text.strip()))


def _ended(job: Job, message: str, status: int) -> int:
    job.print_once(message, lambda text: print(f"fx-influence: {text}", file=sys.stderr, flush=True))
    return status


def _run(arguments: argparse.Namespace, job: Job) -> None:
    plan, out = job.raise_on_all(lambda: _plan(arguments, EntropyInfluencePlan))
    with progress_on_stderr(job.rank == 0) as progress:
        results = run(plan, out, progress)
    job.on_rank0(lambda: _show(results))


def _show(results: EntropyInfluenceResults) -> None:
    print_run(results, _console())
    try:
        _write_page(results)
    except ImportError as error:
        # The run is done and stored: what only the page lacks does not fail it.
        print(f"no page: {error}", file=sys.stderr)


def _fisher(arguments: argparse.Namespace, job: Job) -> None:
    plan, out = job.raise_on_all(lambda: _plan(arguments, FisherKernelPlan))
    with progress_on_stderr(job.rank == 0) as progress:
        results = run_fisher(plan, out, progress)
    job.on_rank0(lambda: print_fisher(results, _console()))


def _report(arguments: argparse.Namespace, job: Job) -> None:
    job.on_rank0(lambda: _show_stored(arguments))


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
    job.on_rank0(lambda: _show_analysis(arguments))


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
