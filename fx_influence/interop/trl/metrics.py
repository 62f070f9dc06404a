"""One measured step of a TRL training run as a value, and its logged metrics."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fx_influence.attribution.result import Influence
from fx_influence.estimators.concentration import top_share
from fx_influence.estimators.snis import SnisDelta
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.trl.capture.step import CapturedStep

TOP_SHARE = 0.01
"""Share of U's tokens whose share of the sum of |influence| is logged as ``concentration``."""


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
        seconds: duration of measuring.
        step_rounding: share of the step that rounding of the weights swallows, see ``precision.step_rounding``.
    """

    step: int
    lr: float
    captured: CapturedStep
    evaluation: list[Rollout]
    influence: Influence
    entropy: float
    measured_change: SnisDelta | None
    seconds: float
    step_rounding: float = float("nan")

    def through_own_prompts(self) -> float:
        """Return what leaving out the rollouts' own prompts takes off the sum of their influences, per unit lr.

        It is 0 with an E of fresh rollouts. Importance sampling on U has it too, to first order in lr.
        """
        influence = self.influence
        if influence.self_influence is None:
            return 0.0
        over_all = torch.stack(list(influence.per_parameter.values())).sum() - influence.unattributed
        return float(over_all - influence.per_sequence.sum())

    def metrics(self) -> dict[str, float]:
        """Return the logged metrics, by name without prefix.

        Changes of entropy are in nats for this step; positive raises the entropy.
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
            "rounding": influence.rounding.nansum(),
        }
        metrics = {name: self.lr * float(value) for name, value in per_unit_lr.items()}
        completion_tokens = influence.per_token[captured.batch.completion_mask]
        concentration = float(top_share(completion_tokens, TOP_SHARE)) if completion_tokens.numel() else math.nan
        metrics |= {"concentration": concentration, "conditioning": float(influence.conditioning)}
        if influence.self_influence is not None:
            metrics["self_influence"] = self.lr * self.through_own_prompts()
        metrics |= {"entropy": self.entropy, "lr": self.lr, "seconds": self.seconds}
        if self.measured_change is not None:
            metrics["measured"] = float(self.measured_change.delta_h) - self.lr * self.through_own_prompts()
            metrics["measured_stderr"] = float(self.measured_change.stderr)
            metrics["ess"] = float(self.measured_change.ess)
            metrics["step_rounding"] = self.step_rounding
        return metrics
