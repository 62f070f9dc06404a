"""What every experiment does around its measurements: load, continue or refuse a directory, sample U, sum up."""

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
from fx_influence.lab.experiment.step import STEP_PIECES
from fx_influence.lab.inputs.rollouts import Progress, ScoredRollouts, load_rollouts
from fx_influence.lab.inputs.training_state import TrainingState, input_sums, load_state, reference_lr
from fx_influence.lab.inputs.update import mean_reward
from fx_influence.lab.plan import AnyPlan, StepPlan
from fx_influence.lab.plan.files import plan_text, resolved
from fx_influence.lab.store import RunDirectory

Results = TypeVar("Results")


class Experiment(NamedTuple):
    """An experiment under way. ``seconds``: by phase, added to by whatever is ``timed`` with it."""

    state: TrainingState
    directory: RunDirectory
    u: ScoredRollouts
    seconds: dict[str, float]
    progress: Progress

    def sampled_evaluation(self, plan: StepPlan, i: int) -> ScoredRollouts:
        """E number ``i``."""
        with timed(self.seconds, "sampling"):
            name = eval_file(i, "_rollouts.jsonl")
            return load_rollouts(plan, self.state, self.directory, i + 1, name, self.progress)


def carry_out(
    plan: AnyPlan,
    path: str | Path | None,
    measure: Callable[[AnyPlan, Experiment], dict[str, Any]],
    load: Callable[[Path], Results],
    progress: Progress,
) -> Results:
    """Store what ``measure`` finds in ``path``, or go on there; a finished directory is left as it is.

    ``path``: None stands for one in ``runs`` that is the plan's own. ``measure`` stores its own pieces and results and
    returns its figures. With the figures common to all experiments they become ``summary.json``, written last of all:
    its presence says that the run is whole. Returns what ``load`` then reads in ``path``.

    The processes of a job all make the call, see ``interop.job``, and all have the results; the first alone touches
    ``path`` and reports progress. Raises ``ValueError`` on all where plans, versions or the files read differ.
    """
    plan = resolved(plan, Path.cwd())
    path = _own_path(plan) if path is None else Path(path)
    with join_job() as job:
        # Before a model is read.
        job.on_rank0(lambda: RunDirectory(path).check_open_to(plan))
        job.check_same({**plan.to_dict(), "packages": environment()["packages"]})
        if job.on_rank0(lambda: RunDirectory(path).has(SUMMARY)):
            directory = RunDirectory.start(path, plan, {}, job)
        else:
            directory = _measured(plan, path, measure, progress if job.rank == 0 else _silent, job)
        directory.remove(*STEP_PIECES)
        return job.on_rank0(lambda: load(path))


def _measured(
    plan: AnyPlan,
    path: Path,
    measure: Callable[[AnyPlan, Experiment], dict[str, Any]],
    progress: Progress,
    job: Job,
) -> RunDirectory:
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        state, inputs = job.raise_on_all(lambda: (load_state(plan, job), input_sums(plan)))
        job.check_same(inputs)
    with limit_threads(sum(p.numel() for p in state.model.parameters())):
        directory = RunDirectory.start(path, plan, inputs, job)
        try:
            with timed(seconds, "sampling"):
                u = load_rollouts(plan, state, directory, 0, UPDATE_ROLLOUTS, progress)
            figures = measure(plan, Experiment(state, directory, u, seconds, progress))
        except USER_ERRORS as error:
            if job.rank == 0:
                # Not in step with the other ranks, which may not have come so far.
                RunDirectory(path).note_failure(error)
            raise
        directory.write_json(SUMMARY, {**figures, **_figures(state, u, seconds)})
    return directory


def _silent(phase: str, done: int, total: int) -> None:
    """Of the processes but the first."""


def _own_path(plan: StepPlan) -> Path:
    name = hashlib.sha256(plan_text(plan).encode()).hexdigest()[:12]
    return Path("runs") / f"{type(plan).__name__}-{name}"


def _figures(state: TrainingState, u: ScoredRollouts, seconds: dict[str, float]) -> dict[str, Any]:
    on_gpu = [peak for peak in state.job.all_gather(peak_gpu_memory_bytes) if peak is not None]
    return {
        "lr": state.opt_state.lr,
        "reference_lr": reference_lr(state),
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
