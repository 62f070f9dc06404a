"""The check of a run's derivatives against finite differences, before its long passes."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fx_influence.finite_check import DerivativeCheck, DerivativeError, check_derivatives
from fx_influence.lab.batches import State
from fx_influence.lab.plan import StepPlan
from fx_influence.parts import rows
from fx_influence.types import Batch, Params

ROWS = 4
"""Rollouts of U on which derivatives are compared with finite differences."""
COPIES_IN_FLOAT64 = 6
"""Trees as large as the parameters that the comparison holds: weights, direction, tangent, step, sum and gradient."""


def derivative_check(plan: StepPlan, state: State, batch: Batch) -> dict[str, Any] | None:
    """Return the figures of ``check_derivatives`` on a few rows of U, made by the first process for all; None without.

    The direction is random and as large in every parameter as that is. AdamW's own would need U's gradient, one of the
    long passes that this precedes, and is a step of the size of rounding in what the optimizer has hardly moved, so
    that a derivative missing there would not show; that of a function is missing along almost every direction or none.
    In float64 where copies of the parameters fit the plan's memory budget, else in the parameters' precision.

    A disagreement is a ``UserWarning`` here and a finding of ``health``, not an error: the finite steps of a run need
    no derivative and are right without. Raises ``DerivativeError`` where the policy has no derivative at all, since
    every later pass would fail.
    """
    return state.job.first(lambda: _record(plan, state, batch))


def _record(plan: StepPlan, state: State, batch: Batch) -> dict[str, Any] | None:
    scored = batch.completion_mask.any(-1).nonzero()[:, 0]
    if not len(scored):
        return None
    spread = torch.linspace(0, len(scored) - 1, min(ROWS, len(scored)), device=scored.device).long()
    try:
        check = check_derivatives(
            state.params,
            rows(batch, scored[spread]),
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
    return torch.float64 if COPIES_IN_FLOAT64 * size <= plan.memory_budget else torch.float32


def _figures(check: DerivativeCheck, agrees: bool) -> dict[str, Any]:
    return {
        "agrees": agrees,
        "conclusive": check.conclusive,
        **check._asdict(),
        "parameters": list(check.parameters),
    }
