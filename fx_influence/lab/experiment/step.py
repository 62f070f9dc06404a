"""Compute the step that U makes from the training state, and say how many directions fit in memory at once."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.batching.rows import distinct_rows, has_loss, row_chunks, select_rows
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
STEP_FILES = GRADIENT, NORMS
"""Files that are stored while a run lasts, and removed when it is finished."""


class Step(NamedTuple):
    """The step that U makes.

    Attributes:
        batch: U with coefficients.
        gradient: of the loss, by parameter name; None where a parameter has none.
        decomposition: AdamW's step with this gradient, split into its terms.
        gradient_norms: (n_u,), |g_i|.
    """

    batch: Batch
    gradient: Gradients
    decomposition: AdamWDecomposition
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
    """Return the step that ``batch`` makes from the training state.

    Args:
        plan: has the settings of the passes and the clipping.
        state: the training state.
        batch: U with coefficients.
        preconditioner: see ``adamw_decompose``.
        directory: stores the gradient and the norms, or has those of an interrupted run.
        progress: called as each of the two is ready.
    """
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
    decomposition = adamw_decompose(gradient, state.opt_state, state.params, preconditioner, plan.max_grad_norm)
    return Step(batch, gradient, decomposition, norms)


def step_directions(
    plan: StepPlan, state: TrainingState, step: Step, names: Collection[str] = STEP_DIRECTIONS
) -> dict[str, Params]:
    """Return v by name of direction, for the directions of the whole step.

    Args:
        plan: has the clipping.
        state: the training state.
        step: the step that U makes.
        names: directions wanted; those of single rollouts among them are ignored.
    """
    directions = {
        "full": step.decomposition.direction,
        "baseline": step.decomposition.baseline,
        "momentum": step.decomposition.momentum,
        "weight_decay": step.decomposition.weight_decay,
    }
    if "rmsprop" in names:
        rmsprop = adamw_decompose(step.gradient, state.opt_state, state.params, "rmsprop", plan.max_grad_norm)
        directions["rmsprop"] = rmsprop.direction
    return {name: v for name, v in directions.items() if name in names}


def directions_per_block(plan: StepPlan, params: Params) -> int:
    """Return how many directions fit the plan's memory budget, with the copies that a measurement needs."""
    size = sum(p.numel() * promote(p.dtype).itemsize for p in params.values())
    return max(1, plan.budget(params) // (plan.copies_of_a_direction() * size))


def rollouts_per_block(plan: StepPlan, params: Params) -> int:
    """Return how many rollouts have their gradients and finite steps, two directions each, computed at once."""
    return max(1, min(plan.sequences_per_block, directions_per_block(plan, params) // 2))


def distinct_update_rows(batch: Batch) -> tuple[Batch, Tensor]:
    """Return the distinct rollouts of U, and the index among them of every rollout, (n_u,).

    Rollouts without a nonzero coefficient move nothing, and all count as copies of the first of them.
    """
    moves = has_loss(batch)
    index = torch.arange(len(moves), device=moves.device)
    inert = index[~moves]
    return distinct_rows(batch if not len(inert) else select_rows(batch, torch.where(moves, index, inert[0])))


def _gradient_norms(plan: StepPlan, state: TrainingState, batch: Batch) -> Tensor:
    distinct, index = distinct_update_rows(batch)

    def norms(rows: Batch) -> Tensor:
        gradients = rollout_gradients(state.params, rows, state.apply, plan.temperature)
        return torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0).cpu()

    blocks = row_chunks(distinct, rollouts_per_block(plan, state.params))
    return torch.cat(state.job.map_tasks([partial(norms, rows) for rows in blocks]))[index.cpu()]
