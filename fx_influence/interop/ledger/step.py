"""Turn a measured step of a live training run into an entry of its ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fx_influence.interop.ledger.entry import ledger_entry, rollout_figures, step_labels
from fx_influence.interop.live.metrics import REGION_METRICS, SOURCE, SOURCE_STDERR, MeasuredStep
from fx_influence.interop.live.step import CapturedStep
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.labels import Labels
from fx_influence.types import TokenValues


def measured_entry(
    measured: MeasuredStep,
    rollouts: Sequence[Rollout],
    figures: Mapping[str, float],
    settings: Mapping[str, str],
    ends_known: bool = True,
) -> dict[str, Any]:
    """Return the entry of a measured step.

    Args:
        measured: the step.
        rollouts: U as records, in the order of the batch.
        figures: numbers of the step beside its metrics and those of its rollouts.
        settings: texts by name, ``preconditioner`` among them.
        ends_known: whether the rollouts' ``finished`` is known; otherwise the entry has no ends.
    """
    captured, influence, lr = measured.captured, measured.influence, measured.lr
    kinds = kinds_of_step(captured, rollouts, measured.regions, ends_known)
    # Sums over regions and sources are among the kinds, with names that need no prefix.
    among_kinds = (SOURCE, SOURCE_STDERR, *REGION_METRICS, "positive_advantage", "negative_advantage")
    all_figures = {name: x for name, x in measured.metrics().items() if not name.startswith(among_kinds)}
    all_figures |= {**rollout_figures(influence, captured.batch, rollouts, lr), "gradient_clip": captured.clip}
    if settings["preconditioner"] == "frozen":
        all_figures["lifetime_factor"] = measured.lifetime_factor
    if not ends_known:
        del all_figures["truncated"]
    return ledger_entry(measured.step, lr, influence, kinds, {**all_figures, **figures}, rollouts, settings)


def kinds_of_step(
    captured: CapturedStep, rollouts: Sequence[Rollout], regions: Labels | None, ends_known: bool
) -> dict[str, Labels]:
    """Return the kinds that influences of a step's rollouts and tokens are added up by.

    Args:
        captured: the step, with entropies.
        rollouts: U as records, in the order of the batch.
        regions: of U's tokens, None where they are no kind.
        ends_known: whether the rollouts' ``finished`` is known; otherwise there are no ends.
    """
    assert captured.entropies is not None
    kinds = step_labels(rollouts, captured.batch, TokenValues(captured.logprobs, captured.entropies))
    if not ends_known:
        del kinds["end"]
    return kinds if regions is None else {"region": regions, **kinds}
