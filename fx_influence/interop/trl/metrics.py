"""One measured step of a TRL run as a value, and the figures that are logged of it."""

from __future__ import annotations

import math
from typing import NamedTuple

from fx_influence._influence import Influence
from fx_influence.estimators.concentration import top_share
from fx_influence.estimators.snis import SnisDelta
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.trl.capture import CapturedStep

TOP = 0.01
"""The share of U's tokens whose part of all |influence| is logged as ``concentration``."""


class MeasuredStep(NamedTuple):
    """One step of a run, before and after: U as captured, E, the influences, and the entropy's real change.

    ``step``: the optimizer steps made when it is done, from 1. ``lr``: lr_ref of this step; influences times it are in
    nats. ``entropy``: the estimate of H on E before the step. ``measured_change``: by importance sampling on the same
    E, None where the optimizer made no step. ``seconds``: duration of measuring. ``step_rounding``: see ``precision``.
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

    def metrics(self) -> dict[str, float]:
        """What is logged, by name without prefix: nats in this step, positive raises the entropy; see the README."""
        out, u = self.influence, self.captured
        parts, advantages = out.per_sequence.cpu(), u.advantages
        assert out.per_token is not None
        if u.token_advantages is not None:
            parts, advantages = out.per_token.cpu(), u.token_advantages.cpu()
        figures = {
            "total": out.total,
            "momentum": out.momentum,
            "weight_decay": out.weight_decay,
            "rollouts": out.per_sequence.sum(),
            "positive_advantage": parts[advantages > 0].sum(),
            "negative_advantage": parts[advantages < 0].sum(),
            "stderr": out.total_stderr,
            "residual": out.residual,
            "unattributed": out.unattributed,
            "rounding": out.rounding.nansum(),
        }
        nats = {name: self.lr * float(value) for name, value in figures.items()}
        counted = out.per_token[u.batch.completion_mask]
        nats["concentration"] = float(top_share(counted, TOP)) if counted.numel() else math.nan
        nats["conditioning"] = float(out.conditioning)
        nats |= {"entropy": self.entropy, "lr": self.lr, "seconds": self.seconds}
        if self.measured_change is not None:
            nats["measured"] = float(self.measured_change.delta_h)
            nats["measured_stderr"] = float(self.measured_change.stderr)
            nats["ess"] = float(self.measured_change.ess)
            nats["step_rounding"] = self.step_rounding
        return nats
