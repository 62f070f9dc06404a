"""What every experiment does around its measurements: load, continue or refuse a directory, sample U, sum up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fx_influence.lab.batches import Progress, Sampled, State, load_state, mean_reward, sampled
from fx_influence.lab.environment import environment, peak_gpu_memory_bytes, peak_memory_bytes, threads_for, timed
from fx_influence.lab.plan import StepPlan
from fx_influence.lab.step import STEP_PIECES
from fx_influence.lab.store import ENVIRONMENT, SUMMARY, UPDATE_ROLLOUTS, RunDirectory, eval_name


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
    plan: StepPlan,
    path: Path,
    measure: Callable[[Experiment], dict[str, Any]],
    bare_numbers: Sequence[str],
    progress: Progress,
) -> None:
    """Store what ``measure`` finds in ``path``, or go on there; a finished directory is left as it is.

    ``measure`` stores its own pieces and results and returns its figures. With the figures common to all experiments
    they become ``summary.json``, written last of all: its presence says that the run is whole. ``bare_numbers``: files
    in which damage would show in no other way; the summary holds their SHA-256.
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        state = load_state(plan)
    directory = RunDirectory.start(path, plan)
    if not directory.has(SUMMARY):
        with threads_for(sum(p.numel() for p in state.model.parameters())):
            directory.write_json(ENVIRONMENT, environment())
            with timed(seconds, "sampling"):
                u = sampled(plan, state, directory, 0, UPDATE_ROLLOUTS, progress)
            figures = measure(Experiment(state, directory, u, seconds, progress))
            common = _figures(state, u, seconds)
            sums = {name: directory.sha256(name) for name in bare_numbers}
            directory.write_json(SUMMARY, {**figures, **common, "sha256": sums})
    directory.remove(*STEP_PIECES)


def _figures(state: State, u: Sampled, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "lr": state.opt_state.lr,
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
