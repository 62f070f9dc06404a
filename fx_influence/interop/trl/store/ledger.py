"""Turn a measured step of a TRL training run into an entry of its ledger."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fx_influence.interop.ledger.step import measured_entry
from fx_influence.interop.live.metrics import MeasuredStep
from fx_influence.interop.live.step import CapturedStep
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.trl.store.training import TRAINING

SETTINGS = ("preconditioner", "normalize")
"""Fields of a step's plan that say what its figures are."""


def step_entry(
    measured: MeasuredStep, rollouts: Sequence[Rollout], plan: Mapping[str, Any], trainer: Any, training_id: str
) -> dict[str, Any]:
    """Return the entry of a measured step.

    Args:
        measured: the step.
        rollouts: U as records, from ``update_rollouts``.
        plan: fields of the step's plan.yaml.
        trainer: the one that made the step.
        training_id: id of the training run, which no other has.
    """
    figures = {
        "clip_fraction": clip_fraction(measured.captured, trainer),
        "evaluation_count": len(measured.evaluation),
    }
    settings = {TRAINING: training_id, **{name: str(plan[name]) for name in SETTINGS}}
    return measured_entry(measured, rollouts, figures, settings)


def clip_fraction(captured: CapturedStep, trainer: Any) -> float:
    """Return the share of U's completion tokens with an advantage whose coefficient is 0: the loss clips them.

    NaN where a coefficient says nothing of clipping: with a KL term, and where the loss takes the tokens of high
    entropy alone.
    """
    if getattr(trainer, "beta", 0.0) or getattr(trainer, "top_entropy_quantile", 1.0) < 1.0:
        return math.nan
    assert captured.batch.coefficients is not None
    mask = captured.batch.completion_mask
    advantages = captured.advantages.unsqueeze(-1) if captured.token_advantages is None else captured.token_advantages
    trained = mask & (advantages.to(mask.device) != 0)
    count = int(trained.sum())
    return float((captured.batch.coefficients[trained] == 0).sum()) / count if count else math.nan
