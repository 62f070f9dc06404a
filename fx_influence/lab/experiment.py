"""What every experiment does around its measurements: load, continue or refuse a directory, sample U, sum up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fx_influence.interop.environment import peak_gpu_memory_bytes, peak_memory_bytes, threads_for, timed
from fx_influence.interop.run_files import SUMMARY, UPDATE_ROLLOUTS, eval_name
from fx_influence.lab.batches import (
    Progress,
    Sampled,
    State,
    input_sums,
    load_state,
    mean_reward,
    reference_lr,
    sampled,
)
from fx_influence.lab.plan import AnyPlan, StepPlan, plan_text, resolved
from fx_influence.lab.step import STEP_PIECES
from fx_influence.lab.store import RunDirectory


class Experiment(NamedTuple):
    """An experiment under way. ``seconds``: by phase, added to by whatever is ``timed`` with it."""

    state: State
    directory: RunDirectory
    u: Sampled
    seconds: dict[str, float]
    progress: Progress

    def sampled_evaluation(self, plan: StepPlan, i: int) -> Sampled:
        """E number ``i``."""
        with timed(self.seconds, "sampling"):
            name = eval_name(i, "_rollouts.jsonl")
            return sampled(plan, self.state, self.directory, i + 1, name, self.progress)


def carry_out(
    plan: AnyPlan,
    path: str | Path | None,
    measure: Callable[[AnyPlan, Experiment], dict[str, Any]],
    progress: Progress,
) -> Path:
    """Store what ``measure`` finds in ``path``, or go on there; a finished directory is left as it is.

    ``path``: None stands for one in ``runs`` that is the plan's own. Returns it. ``measure`` stores its own pieces and
    results and returns its figures. With the figures common to all experiments they become ``summary.json``, written
    last of all: its presence says that the run is whole.
    """
    plan = resolved(plan, Path.cwd())
    path = _own_path(plan) if path is None else Path(path)
    seconds: dict[str, float] = {}
    if RunDirectory(path).has(SUMMARY):
        directory = RunDirectory.start(path, plan, {})
    else:
        with timed(seconds, "load"):
            state, inputs = load_state(plan), input_sums(plan)
        with threads_for(sum(p.numel() for p in state.model.parameters())):
            directory = RunDirectory.start(path, plan, inputs)
            with timed(seconds, "sampling"):
                u = sampled(plan, state, directory, 0, UPDATE_ROLLOUTS, progress)
            figures = measure(plan, Experiment(state, directory, u, seconds, progress))
            directory.write_json(SUMMARY, {**figures, **_figures(state, u, seconds)})
    directory.remove(*STEP_PIECES)
    return path


def _own_path(plan: StepPlan) -> Path:
    name = hashlib.sha256(plan_text(plan).encode()).hexdigest()[:12]
    return Path("runs") / f"{type(plan).__name__}-{name}"


def _figures(state: State, u: Sampled, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "lr": state.opt_state.lr,
        "reference_lr": reference_lr(state),
        "update_rollouts": len(u.rollouts),
        "update_mean_reward": mean_reward(u.rollouts),
        "update_off_policy": u.off_policy,
        "trainable_parameters": sum(p.numel() for p in state.params.values()),
        "seconds": sum(seconds.values()),
        "seconds_by_phase": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_memory_bytes": peak_gpu_memory_bytes(),
        "torch_threads": torch.get_num_threads(),
    }
