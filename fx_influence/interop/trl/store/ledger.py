"""Turn a measured step of a TRL training run into an entry of its ledger."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fx_influence.interop.ledger.entry import ledger_entry, rollout_figures, step_labels
from fx_influence.interop.live.metrics import REGION_METRICS, SOURCE, SOURCE_STDERR, MeasuredStep
from fx_influence.interop.live.step import CapturedStep
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.trl.store.training import TRAINING
from fx_influence.types import TokenValues

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
    captured, influence, lr = measured.captured, measured.influence, measured.lr
    assert captured.entropies is not None
    kinds = step_labels(rollouts, captured.batch, TokenValues(captured.logprobs, captured.entropies))
    if measured.regions is not None:
        kinds = {"region": measured.regions, **kinds}
    # Sums over regions and sources are among the kinds, with names that need no prefix.
    among_kinds = (SOURCE, SOURCE_STDERR, *REGION_METRICS, "positive_advantage", "negative_advantage")
    figures = {name: x for name, x in measured.metrics().items() if not name.startswith(among_kinds)}
    figures |= rollout_figures(influence, captured.batch, rollouts, lr)
    figures |= {"clip_fraction": clip_fraction(captured, trainer), "gradient_clip": captured.clip}
    figures["evaluation_count"] = len(measured.evaluation)
    if plan["preconditioner"] == "frozen":
        figures["lifetime_factor"] = measured.lifetime_factor
    settings = {TRAINING: training_id, **{name: str(plan[name]) for name in SETTINGS}}
    return ledger_entry(measured.step, lr, influence, kinds, figures, rollouts, settings)


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
