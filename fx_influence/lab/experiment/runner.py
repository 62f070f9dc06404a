"""Run any experiment around its measurements: load, continue or refuse a directory, sample U, write the summary."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fx_influence.interop.runtime.environment import (
    environment,
    limit_threads,
    peak_gpu_memory_bytes,
    peak_memory_bytes,
    timed,
)
from fx_influence.interop.runtime.job import USER_ERRORS, Job, join_job
from fx_influence.interop.runtime.run_files import SUMMARY, UPDATE_ROLLOUTS, eval_file
from fx_influence.lab.experiment.step import STEP_FILES
from fx_influence.lab.inputs.rollouts import Progress, ScoredRollouts, load_rollouts, load_state, mean_reward
from fx_influence.lab.inputs.training_state import TrainingState, input_hashes
from fx_influence.lab.plan import AnyPlan, StepPlan, plan_text, resolved
from fx_influence.lab.store import RunDirectory

Results = TypeVar("Results")


class RunContext(NamedTuple):
    """A run under way.

    Attributes:
        state: the training state.
        directory: of the run.
        u: the rollouts of U, scored.
        seconds: by phase; ``timed`` adds to it.
        progress: called as the work goes on.
    """

    state: TrainingState
    directory: RunDirectory
    u: ScoredRollouts
    seconds: dict[str, float]
    progress: Progress

    def load_evaluation(self, plan: StepPlan, i: int) -> ScoredRollouts:
        """Return the rollouts of E number ``i``, stored ones or new."""
        with timed(self.seconds, "sampling"):
            name = eval_file(i, "_rollouts.jsonl")
            return load_rollouts(plan, self.state, self.directory, i + 1, name, self.progress)


def run_experiment(
    plan: AnyPlan,
    path: str | Path | None,
    measure: Callable[[AnyPlan, RunContext], dict[str, Any]],
    load: Callable[[Path], Results],
    progress: Progress,
) -> Results:
    """Store what ``measure`` measures in ``path``, or continue there; a finished directory is left as it is.

    All processes of a job make the call, see ``interop.runtime.job``, and receive the results; only the first touches
    ``path`` and reports progress.

    Args:
        plan: what to measure.
        path: run directory; None: one in ``runs`` that is named after the plan's content.
        measure: stores its results, and returns its figures. With the figures common to all experiments they become
            ``summary.json``, which is written last: its presence says that the run is complete.
        load: reads the results in ``path``.
        progress: called as the work goes on.

    Returns:
        What ``load`` reads in ``path``.

    Raises:
        RunDirectoryError: where ``path`` holds something else.
        ValueError: on all processes, where plans, versions or the files read differ.
    """
    plan = resolved(plan, Path.cwd())
    path = _default_path(plan) if path is None else Path(path)
    with join_job() as job:
        # The directory and the plans are checked before a model is read, which may take minutes.
        job.on_rank0(lambda: RunDirectory(path).check_open_to(plan))
        job.check_same({**plan.to_dict(), "packages": environment()["packages"]})
        if job.on_rank0(lambda: RunDirectory(path).has(SUMMARY)):
            directory = RunDirectory.start(path, plan, {}, job)
        else:
            directory = _measure_and_store(plan, path, measure, progress if job.rank == 0 else _no_progress, job)
        directory.remove(*STEP_FILES)
        return job.on_rank0(lambda: load(path))


def _measure_and_store(
    plan: AnyPlan,
    path: Path,
    measure: Callable[[AnyPlan, RunContext], dict[str, Any]],
    progress: Progress,
    job: Job,
) -> RunDirectory:
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        state, inputs = job.raise_on_all(lambda: (load_state(plan, job), input_hashes(plan)))
        job.check_same(inputs)
    with limit_threads(sum(p.numel() for p in state.model.parameters())):
        directory = RunDirectory.start(path, plan, inputs, job)
        try:
            with timed(seconds, "sampling"):
                u = load_rollouts(plan, state, directory, 0, UPDATE_ROLLOUTS, progress)
            figures = measure(plan, RunContext(state, directory, u, seconds, progress))
        except USER_ERRORS as error:
            if job.rank == 0:
                # Without the job's collectives, because other ranks may not have reached this line.
                RunDirectory(path).note_failure(error)
            raise
        directory.write_json(SUMMARY, {**figures, **_common_figures(state, u, seconds)})
    return directory


def _no_progress(phase: str, done: int, total: int) -> None:
    """Report nothing: the progress callback of ranks other than 0."""


def _default_path(plan: StepPlan) -> Path:
    name = hashlib.sha256(plan_text(plan).encode()).hexdigest()[:12]
    return Path("runs") / f"{type(plan).__name__}-{name}"


def _common_figures(state: TrainingState, u: ScoredRollouts, seconds: dict[str, float]) -> dict[str, Any]:
    on_gpu = [peak for peak in state.job.all_gather(peak_gpu_memory_bytes) if peak is not None]
    return {
        "lr": state.opt_state.lr,
        "reference_lr": state.reference_lr,
        "update_rollouts": len(u.rollouts),
        "update_mean_reward": mean_reward(u.rollouts),
        "update_off_policy": u.off_policy,
        "trainable_parameters": sum(p.numel() for p in state.params.values()),
        "seconds": sum(seconds.values()),
        "seconds_by_phase": seconds,
        "peak_memory_bytes": max(state.job.all_gather(peak_memory_bytes)),
        "peak_gpu_memory_bytes": max(on_gpu, default=None),
        "torch_threads": torch.get_num_threads(),
        "ranks": state.job.size,
    }
