"""Define the plans of the two experiments: influence on the entropy, and the Fisher kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from fx_influence.interop.runtime.renamed import PLAN_FIELDS
from fx_influence.lab.plan.batch_request import Number, WholeNumber
from fx_influence.lab.plan.errors import refusal
from fx_influence.lab.plan.step_plan import StepPlan
from fx_influence.objectives import Entropy
from fx_influence.types import Estimator, Normalize, Preconditioner

StepDirection = Literal["full", "baseline", "momentum", "weight_decay", "rmsprop"]
Direction = Literal[StepDirection, "grad", "baseline_plus_grad"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
ROLLOUT_DIRECTIONS: tuple[str, ...] = ("grad", "baseline_plus_grad")
"""Directions of every rollout of U: v_i, and v_baseline + v_i."""
STEP_DIRECTIONS: tuple[str, ...] = get_args(StepDirection)
"""Directions of the whole step; ``rmsprop`` has neither momentum nor decay."""


@dataclass(frozen=True, repr=False)
class EntropyInfluencePlan(StepPlan):
    """Plan of the main experiment: influences of U on the entropy over each E, to first order and at finite steps.

    Units are nats, and multiples of the optimizer's learning rate.

    Args:
        estimator: see ``fx.Entropy``.
        normalize: see ``fx.Entropy``.
        preconditioner: see ``fx.influence``; in version 0.1 ``gain``.
        directions: those that finite steps are taken along, by importance sampling; with none there are no finite
            steps, and nothing is computed for them.
        eta_multiples: step sizes that lines are fitted to.
        scaled_eta_multiples: larger step sizes, at which a rollout can be seen whose step at the learning rate is lost
            in rounding.
        auto_scale: a step size is also chosen for each rollout so that its |Delta H| is this many times the one that
            float32 rounding of the weights causes; None: no such step.
        compare_float64: repeat every finite step in float64, which shows the rounding.
        second_order: directions of the whole step whose d2H/deta2 is computed, about 13 forwards of E each; the one
            along ``full`` says how far the first order holds (``eta_trust``).
        second_order_per_sequence: compute d2H/deta2 along each rollout's directions too, at the same cost for each.
        reward_influence: compute the influences on E's expected reward too, where every rollout of E has a reward, at
            about the cost of those on the entropy.

    The other fields are those of ``StepPlan``.

    Example:
        >>> plan = EntropyInfluencePlan.from_dict({"checkpoint": "demo", "seed": 3})
        >>> plan.seed, plan.eta_multiples
        (3, (0.2, 0.5, 1.0, 2.0, 5.0))
    """

    old_fields: ClassVar[Mapping[str, str]] = PLAN_FIELDS

    estimator: Estimator = "per_decision"
    normalize: Normalize = "token"
    preconditioner: Preconditioner = "frozen"
    directions: tuple[Direction, ...] = DIRECTIONS
    eta_multiples: tuple[Number, ...] = (0.2, 0.5, 1.0, 2.0, 5.0)
    scaled_eta_multiples: tuple[Number, ...] = (20.0, 100.0)
    auto_scale: Number | None = 100.0
    compare_float64: bool = False
    second_order: tuple[StepDirection, ...] = ("full",)
    second_order_per_sequence: bool = False
    reward_influence: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eta_multiples", "scaled_eta_multiples"):
            if any(not 0 < eta < math.inf for eta in getattr(self, name)):
                raise refusal(name, list(getattr(self, name)), "positive multiples of the learning rate")
        if not self.eta_multiples:
            raise refusal("eta_multiples", [], "at least one multiple of the learning rate", "1.0 is the step itself.")
        if self.auto_scale is not None and not 0 < self.auto_scale < math.inf:
            raise refusal("auto_scale", self.auto_scale, "a factor such as 100, or null for none")
        if "baseline_plus_grad" in self.directions and "baseline" not in self.directions:
            remedy = "baseline_plus_grad is read less baseline: add baseline."
            raise refusal("directions", list(self.directions), "baseline beside baseline_plus_grad", remedy)

    def second_order_directions(self) -> set[str]:
        """Return the directions of the whole step whose second derivative is needed.

        The baseline's is also needed if it has to be subtracted from that along each v_baseline + v_i.
        """
        needs_baseline = self.second_order_per_sequence and "baseline_plus_grad" in self.directions
        return {*self.second_order, *(("baseline",) if needs_baseline else ())}

    def copies_of_a_direction(self) -> int:
        """Return the memory that measuring along a direction takes, in sizes of the direction.

        Finite steps in float64 take two more copies, each twice as large.
        """
        return super().copies_of_a_direction() + (4 if self.compare_float64 else 0)

    def estimation(self) -> dict[str, Any]:
        """Return the arguments of ``influence``, ``jvp_delta`` and ``snis_sweep`` that define the estimate."""
        return {
            "objective": Entropy(self.estimator, self.normalize),
            "temperature": self.temperature,
            "chunk_size": self.chunk_size,
        }


@dataclass(frozen=True, repr=False)
class FisherKernelPlan(StepPlan):
    """Plan of the Fisher experiment: effects of U's rollouts and of their step on E's log-probabilities.

    Args:
        preconditioner: P of the kernel, see ``fx.fisher_kernel``.
        top: number of U's rollouts that are listed for each rollout of E.

    The other fields are those of ``StepPlan``.

    Example:
        >>> FisherKernelPlan(preconditioner="identity").top
        5
    """

    command: ClassVar[str] = "fisher"

    preconditioner: Literal["adam", "identity"] = "adam"
    top: WholeNumber = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise refusal("top", self.top, "at least 1 rollout")
