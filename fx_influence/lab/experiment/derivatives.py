"""Compare a run's derivatives with finite differences, before its long passes."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fx_influence.batching.rows import select_rows
from fx_influence.derivative_check import DerivativeCheck, DerivativeError, check_derivatives
from fx_influence.lab.inputs.training_state import TrainingState
from fx_influence.lab.plan import StepPlan
from fx_influence.types import Batch, Params

ROWS = 4
"""Number of rollouts of U on which derivatives are compared with finite differences."""
COPIES_IN_FLOAT64 = 6
"""Number of trees as large as the parameters that the comparison has in memory.

These are the weights, the direction, the tangent, the step, the sum and the gradient.
"""


def derivative_check(plan: StepPlan, state: TrainingState, batch: Batch) -> dict[str, Any] | None:
    """Return the figures of ``check_derivatives`` on a few rows of U, computed by the first process for all.

    The direction is random, in every parameter as large as the parameter. AdamW's direction would need U's gradient,
    one of the long passes that this precedes, and is a step of the size of rounding in parameters that the optimizer
    has hardly moved, so that a derivative missing there would not show; a function's derivative is missing along almost
    every direction or along none. The comparison is in float64 where copies of the parameters fit the plan's memory
    budget, else in float32. A disagreement is a ``UserWarning`` here and a finding of ``health``, not an error, because
    the finite steps of a run need no derivative and are right without it.

    Args:
        plan: has the settings of the passes.
        state: the training state.
        batch: U.

    Returns:
        The fields of ``DerivativeCheck``, ``agrees`` and ``conclusive``; None where U has no completion token.

    Raises:
        DerivativeError: where the policy has no derivative at all, since every later pass would fail.
    """
    return state.job.on_rank0(lambda: _check(plan, state, batch))


def _check(plan: StepPlan, state: TrainingState, batch: Batch) -> dict[str, Any] | None:
    scored_rows = batch.completion_mask.any(-1).nonzero()[:, 0]
    if not len(scored_rows):
        return None
    evenly = torch.linspace(0, len(scored_rows) - 1, min(ROWS, len(scored_rows)), device=scored_rows.device).long()
    try:
        check = check_derivatives(
            state.params,
            select_rows(batch, scored_rows[evenly]),
            apply=state.apply,
            temperature=plan.temperature,
            chunk_size=plan.chunk_size,
            dtype=_precision(plan, state.params),
        )
    except DerivativeError as error:
        if error.check is None:
            raise
        warnings.warn(f"{error}. The run goes on: its finite steps need no derivative", stacklevel=2)
        return _figures(error.check, agrees=False)
    return _figures(check, agrees=True)


def _precision(plan: StepPlan, params: Params) -> torch.dtype:
    size = sum(p.numel() for p in params.values()) * torch.float64.itemsize
    return torch.float64 if COPIES_IN_FLOAT64 * size <= plan.budget(params) else torch.float32


def _figures(check: DerivativeCheck, agrees: bool) -> dict[str, Any]:
    return {
        "agrees": agrees,
        "conclusive": check.conclusive,
        **check._asdict(),
        "parameters": list(check.parameters),
    }
