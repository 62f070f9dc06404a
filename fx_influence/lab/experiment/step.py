"""The step that U makes from the training state."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.batching.rows import distinct_rows, row_chunks, select_rows
from fx_influence.core.display import record_line
from fx_influence.core.tree import promote
from fx_influence.interop.runtime.run_files import GRADIENT, raise_if_damaged
from fx_influence.lab.inputs.rollouts import Progress
from fx_influence.lab.inputs.training_state import TrainingState
from fx_influence.lab.plan import STEP_DIRECTIONS, StepPlan
from fx_influence.lab.store import RunDirectory
from fx_influence.optim.adamw import AdamWDecomposition, adamw_decompose
from fx_influence.types import Batch, Gradients, Params, Preconditioner

NORMS = "step_gradient_norms.npy"
STEP_PIECES = GRADIENT, NORMS
"""Kept while a run lasts."""


class Step(NamedTuple):
    """U's batch with coefficients, its gradient and what AdamW makes of it, and |g_i| (n_u,)."""

    batch: Batch
    gradient: Gradients
    parts: AdamWDecomposition
    gradient_norms: Tensor

    def __repr__(self) -> str:
        return record_line(self)


def measure_step(
    plan: StepPlan,
    state: TrainingState,
    batch: Batch,
    preconditioner: Preconditioner,
    directory: RunDirectory,
    progress: Progress,
) -> Step:
    """The step that ``batch`` makes from the training state; its gradient is kept in ``directory``, or read there."""
    progress("step", 0, 2)
    if not directory.has(GRADIENT):
        g = batch_gradient(state.params, batch, state.apply, plan.temperature, plan.chunk_size)
        directory.write_tensors(GRADIENT, {name: x for name, x in g.items() if x is not None})
    progress("step", 1, 2)
    if not directory.has(NORMS):
        directory.write_array(NORMS, _gradient_norms(plan, state, batch).numpy())
    progress("step", 2, 2)
    with raise_if_damaged(directory.path):
        stored, norms = directory.read_tensors(GRADIENT), torch.from_numpy(directory.read_array(NORMS))
    gradient: Gradients = {name: stored[name].to(plan.device) if name in stored else None for name in state.params}
    parts = adamw_decompose(gradient, state.opt_state, state.params, preconditioner, plan.max_grad_norm)
    return Step(batch, gradient, parts, norms)


def step_directions(
    plan: StepPlan, state: TrainingState, step: Step, names: Collection[str] = STEP_DIRECTIONS
) -> dict[str, Params]:
    """v by name, for those of ``names`` that are directions of the whole step, in the order of ``STEP_DIRECTIONS``."""
    parts = step.parts
    found = {
        "full": parts.direction,
        "baseline": parts.baseline,
        "momentum": parts.momentum,
        "weight_decay": parts.weight_decay,
    }
    if "rmsprop" in names:
        decomposed = adamw_decompose(step.gradient, state.opt_state, state.params, "rmsprop", plan.max_grad_norm)
        found["rmsprop"] = decomposed.direction
    return {name: v for name, v in found.items() if name in names}


def directions_per_block(plan: StepPlan, params: Params) -> int:
    """How many directions fit the plan's memory budget, with the copies that measuring along one takes."""
    size = sum(p.numel() * promote(p.dtype).itemsize for p in params.values())
    return max(1, plan.memory_budget // (plan.copies_of_a_direction() * size))


def rollouts_per_block(plan: StepPlan, params: Params) -> int:
    """How many rollouts' gradients and finite steps, two directions each, are made together."""
    return max(1, min(plan.sequences_per_block, directions_per_block(plan, params) // 2))


def moving_rows(batch: Batch) -> tuple[Batch, Tensor]:
    """The rollouts of U that differ, each once, and for every rollout the index of its equal; (n_u,).

    Rollouts without a coefficient move nothing and are all equal to the first of them.
    """
    weights = [w for w in (batch.coefficients, batch.entropy_coefficients) if w is not None]
    moves = torch.stack([(w != 0).any(-1) for w in weights]).any(0)
    index = torch.arange(len(moves), device=moves.device)
    still = index[~moves]
    return distinct_rows(batch if not len(still) else select_rows(batch, torch.where(moves, index, still[0])))


def _gradient_norms(plan: StepPlan, state: TrainingState, batch: Batch) -> Tensor:
    once, index = moving_rows(batch)

    def norms(part: Batch) -> Tensor:
        gradients = rollout_gradients(state.params, part, state.apply, plan.temperature)
        return torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0).cpu()

    parts = row_chunks(once, rollouts_per_block(plan, state.params))
    return torch.cat(state.job.map_tasks([partial(norms, part) for part in parts]))[index.cpu()]
