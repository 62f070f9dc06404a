"""One measured step of a training run as a value, its metrics, and those that go to its log."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence import labels
from fx_influence.attribution.result import Influence, Sums
from fx_influence.estimators.concentration import top_share
from fx_influence.estimators.snis import SnisDelta
from fx_influence.interop.ledger.entry import DEGREES, MEASURED_DEGREES
from fx_influence.interop.live.step import CapturedStep
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.labels import Labels
from fx_influence.types import TokenValues

PREFIX = "entropy_influence/"
"""Prefix of the metrics' names in a training run's log."""

TOP_SHARE = 0.01
"""Share of U's tokens whose share of the sum of |influence| is the metric ``concentration``."""

REGION_METRICS = ("positive_likely", "positive_unlikely", "negative_likely", "negative_unlikely", "zero_advantage")
"""Metrics of the sums over ``labels.REGIONS``, in their order."""

SOURCE, SOURCE_STDERR = "source/", "source_stderr/"
"""Prefixes of the metrics of a source: its sum, and the standard error of that."""

MAX_SOURCES = 16
"""Sources of a step that have metrics, those with the largest shares of the sum of |influence|."""

MAX_LOGGED = 16
"""Metrics of a step that go to the trainer's log."""

MAX_LOGGED_SOURCES = 2
"""Sources in the trainer's log; two leave space for the four regions and the total beside them."""

LOGGED_FIRST = (
    *("total", "stderr", "measured", "self_influence"),
    *(name + end for name in REGION_METRICS[:4] for end in ("", "_stderr")),
)
LOGGED_LAST = ("momentum", "rollouts", "entropy", "conditioning", "measured_stderr")
"""Metrics that go to the trainer's log before and after those of sources, as far as there is space."""


class MeasuredStep(NamedTuple):
    """One step of a training run, before and after the optimizer's update.

    Attributes:
        step: number of optimizer steps when it is done, from 1.
        lr: lr_ref of this step; influences times it are in nats.
        captured: the update batch U, as the trainer's loss used it.
        evaluation: the evaluation batch E as records; U's own where the influences are cross-fitted.
        influence: of U on the entropy over E, per unit lr.
        entropy: estimate of H on E before the step, nats.
        measured_change: change of H over the step, by importance sampling on the same E, nothing left out; None where
            the optimizer made no step.
        change_over_others, unexplained_stderr, measured_degrees_of_freedom: see ``change.measured``.
        seconds: duration of measuring.
        step_rounding: share of the step that rounding of the weights swallows, see ``precision.step_rounding``; of the
            master weights, where the forward has roundings of them.
        forward_rounding: the same of the forward's roundings of master weights; NaN where there are none.
        unrounded_change: ``change()`` as it were without these roundings; None where there are none.
        moment_rounding: share of the first moments that quantising them changed after the step, see
            ``precision.moment_rounding``; NaN for an optimizer with full moments.
        regions: labels of U's tokens, from ``regions_of``; None where they were not made.
        lifetime_factor: see ``ledger.entry.lifetime_factor``.
    """

    step: int
    lr: float
    captured: CapturedStep
    evaluation: list[Rollout]
    influence: Influence
    entropy: float
    measured_change: SnisDelta | None
    seconds: float
    step_rounding: float = math.nan
    forward_rounding: float = math.nan
    unrounded_change: SnisDelta | None = None
    moment_rounding: float = math.nan
    regions: Labels | None = None
    lifetime_factor: float = math.nan
    change_over_others: SnisDelta | None = None
    unexplained_stderr: float = math.nan
    measured_degrees_of_freedom: int = 0

    def through_own_prompts(self) -> float:
        """Return what leaving out the rollouts' own prompts takes off the sum of their influences, per unit lr.

        It is 0 with an E of fresh rollouts.
        """
        influence = self.influence
        if influence.self_influence is None:
            return 0.0
        over_all = torch.stack(list(influence.per_parameter.values())).sum() - influence.unattributed
        return float(over_all - influence.per_sequence.sum())

    def change(self) -> SnisDelta | None:
        """Return the change of H over the step, on rollouts that the step was not made from; None without a step."""
        return self.measured_change if self.change_over_others is None else self.change_over_others

    def metrics(self) -> dict[str, float]:
        """Return the metrics, by name without prefix.

        Changes of entropy are in nats for this step; positive raises the entropy. Standard errors that are not known
        are left out. Those of sources come last, the one with the largest share of the sum of |influence| first.
        """
        influence, captured = self.influence, self.captured
        by_advantage, advantages = influence.per_sequence.cpu(), captured.advantages
        assert influence.per_token is not None
        if captured.token_advantages is not None:
            by_advantage, advantages = influence.per_token.cpu(), captured.token_advantages.cpu()
        per_unit_lr = {
            "total": influence.total,
            "momentum": influence.momentum,
            "weight_decay": influence.weight_decay,
            "rollouts": influence.per_sequence.sum(),
            "positive_advantage": by_advantage[advantages > 0].sum(),
            "negative_advantage": by_advantage[advantages < 0].sum(),
            "stderr": influence.total_stderr,
            "residual": influence.residual,
            "unattributed": influence.unattributed,
        }
        if not influence.rounding.isnan().all():
            per_unit_lr["rounding"] = influence.rounding.nansum()
        metrics = {name: self.lr * float(value) for name, value in per_unit_lr.items()}
        completion_tokens = influence.per_token[captured.batch.completion_mask]
        concentration = float(top_share(completion_tokens, TOP_SHARE)) if completion_tokens.numel() else math.nan
        metrics |= {"concentration": concentration, "conditioning": float(influence.conditioning)}
        if influence.self_influence is not None:
            metrics["self_influence"] = self.lr * self.through_own_prompts()
        metrics |= {"entropy": self.entropy, "lr": self.lr, "seconds": self.seconds}
        if influence.degrees_of_freedom is not None:
            metrics[DEGREES] = float(influence.degrees_of_freedom)
        change = self.change()
        if change is not None:
            metrics |= {"measured": float(change.delta_h), "measured_stderr": float(change.stderr)}
            metrics[MEASURED_DEGREES] = float(self.measured_degrees_of_freedom)
            metrics |= {} if math.isnan(self.unexplained_stderr) else {"unexplained_stderr": self.unexplained_stderr}
            metrics["ess"] = float(change.ess)
            if self.unrounded_change is not None:
                metrics["measured_rounding"] = float(change.delta_h - self.unrounded_change.delta_h)
            metrics["step_rounding"] = self.step_rounding
            shares = {"forward_rounding": self.forward_rounding, "moment_rounding": self.moment_rounding}
            metrics |= {name: share for name, share in shares.items() if not math.isnan(share)}
        return metrics | self._sums_by_region() | self._sums_by_source()

    def _sums_by_region(self) -> dict[str, float]:
        if self.regions is None:
            return {}
        sums = self.influence.sums(self.regions)
        values, errors = self._in_this_step(sums.influence), self._in_this_step(sums.stderr)
        known = {f"{name}_stderr": x for name, x in zip(REGION_METRICS, errors, strict=True) if math.isfinite(x)}
        return dict(zip(REGION_METRICS, values, strict=True)) | known

    def _sums_by_source(self) -> dict[str, float]:
        if not any(self.captured.sources):
            return {}
        sums = self.influence.sums(labels.sources(self.captured.sources))
        values, errors = self._in_this_step(sums.influence), self._in_this_step(sums.stderr)
        metrics = {}
        for k in _by_share(sums)[:MAX_SOURCES]:
            metrics[SOURCE + sums.names[k]] = values[k]
            if math.isfinite(errors[k]):
                metrics[SOURCE_STDERR + sums.names[k]] = errors[k]
        return metrics

    def _in_this_step(self, per_unit_lr: Tensor) -> list[float]:
        return [self.lr * x for x in per_unit_lr.tolist()]


class LogSelection:
    """Choose the metrics of each step that go to the trainer's log: at most ``MAX_LOGGED``, the others are in history.

    Sources get a place as they first have metrics, the strongest first, and keep it for the rest of the training run,
    so that a curve has no gaps but the steps in which its source has no rollouts.
    """

    def __init__(self) -> None:
        self._sources: list[str] = []

    def of_step(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return those of a step's ``metrics`` that are logged."""
        sources = [name.removeprefix(SOURCE) for name in metrics if name.startswith(SOURCE)]
        self._sources += [name for name in sources if name not in self._sources]
        del self._sources[MAX_LOGGED_SOURCES:]
        of_sources = [prefix + name for name in self._sources for prefix in (SOURCE, SOURCE_STDERR)]
        # A source without rollouts in this step keeps its place, so that no other metric comes and goes with it.
        space = MAX_LOGGED - len(of_sources)
        others = [name for name in (*LOGGED_FIRST, *LOGGED_LAST) if name in metrics][:space]
        return {name: metrics[name] for name in (*others, *of_sources) if name in metrics}


def regions_of(captured: CapturedStep) -> Labels:
    """Return the region of each of U's tokens: sign of its advantage, likely or not."""
    assert captured.entropies is not None
    advantages = captured.advantages if captured.token_advantages is None else captured.token_advantages
    return labels.regions(captured.batch, TokenValues(captured.logprobs, captured.entropies), advantages)


def _by_share(sums: Sums) -> list[int]:
    """Return the places of the labels, the one with the largest share of the sum of |influence| first."""
    return sorted(range(len(sums.names)), key=lambda k: (-float(sums.share[k].nan_to_num()), sums.names[k]))
