"""What a run measures, as a value that is written to and read from YAML; a stored plan repeats its run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fx_influence.autodiff.gram import MEMORY_BUDGET
from fx_influence.core.display import record_line
from fx_influence.lab.plan.batch_request import (
    REQUEST_FIELDS,
    BatchRequest,
    Number,
    RolloutFile,
    SampledBatch,
    WholeNumber,
    check_request,
    plain_request,
)
from fx_influence.lab.plan.demo import ADDITIONS, DEMO, DEMO_FIELDS, OF_THE_DEMO
from fx_influence.lab.plan.errors import PlanError, refusal, unknown_field
from fx_influence.lab.plan.type_errors import first_type_error
from fx_influence.objectives import Entropy
from fx_influence.types import Estimator, LossType, Normalize, Preconditioner

Dtype = Literal["auto", "float32", "float64", "bfloat16"]
StepDirection = Literal["full", "baseline", "momentum", "weight_decay", "rmsprop"]
Direction = Literal[StepDirection, "grad", "baseline_plus_grad"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
ROLLOUT_DIRECTIONS: tuple[str, ...] = ("grad", "baseline_plus_grad")
"""Directions of every rollout of U: v_i, and v_baseline + v_i."""
STEP_DIRECTIONS: tuple[str, ...] = get_args(StepDirection)
"""Directions of the whole step; ``rmsprop`` has neither momentum nor decay."""
AnyPlan = TypeVar("AnyPlan", bound="StepPlan")


@dataclass(frozen=True, repr=False)
class StepPlan:
    """One training state and its batches: what every experiment begins with.

    ``checkpoint``: a directory, or ``demo``; ``base``: the base model of an adapter. ``dtype``: of the weights; what is
    in half precision is computed with in float32. ``reward``: ``module:function``, see ``interop.rewards``. ``loss``,
    ``scale_advantages``, ``max_grad_norm``, ``temperature``, ``max_new_tokens``: as in the training run, and
    ``clip_range``, epsilon below and above, which counts where U is of an older policy. ``update``,
    ``evaluations``: the batches U and E, see ``lab.requests``. ``chunk_size``: rows per forward (null: by tokens).
    ``sequences_per_block``: how many rollouts of U, at most, have their finite steps taken and stored together.
    ``memory_budget``: bytes of per-sequence gradients and directions held at once. ``seed``: of all sampling.

    ``update``, ``evaluations``, ``reward``, ``loss`` and ``max_new_tokens`` have the embedded training's values where
    ``checkpoint`` is ``demo``; with any other checkpoint they must be given, but for ``reward`` where nothing is
    sampled and ``loss`` where ``update`` is a file, whose rollouts may have coefficients: None then. The defaults of
    ``scale_advantages``, ``clip_range``, ``max_grad_norm`` and ``temperature`` are those of trainers (TRL, verl),
    all others say nothing of a training. Learning rates, betas and weight decay are the optimizer state's own.
    Raises ``PlanError`` for a field that is missing, unknown, of another type or out of range.
    """

    checkpoint: str = DEMO
    base: str | None = None
    dtype: Dtype = "auto"
    device: str = "cpu"
    reward: str | None = OF_THE_DEMO
    loss: LossType | None = OF_THE_DEMO
    scale_advantages: bool = True
    clip_range: tuple[Number, Number] = (0.2, 0.2)
    max_grad_norm: Number | None = 1.0
    temperature: Number = 1.0
    max_new_tokens: WholeNumber = OF_THE_DEMO
    update: BatchRequest = OF_THE_DEMO
    evaluations: tuple[BatchRequest, ...] = OF_THE_DEMO
    chunk_size: WholeNumber | None = None
    sequences_per_block: WholeNumber = 8
    memory_budget: WholeNumber = MEMORY_BUDGET
    seed: WholeNumber = 0

    def __post_init__(self) -> None:
        if self.checkpoint == DEMO:
            self._take_from_the_demo()
        self._check_types()
        self._check_present()
        if not self.evaluations:
            raise refusal("evaluations", [], "at least one batch of prompts to evaluate on")
        check_request("update", self.update, update=True)
        for i, request in enumerate(self.evaluations):
            check_request(f"evaluations[{i}]", request, update=False)
        if not 0 < self.temperature < math.inf:
            raise refusal("temperature", self.temperature, "a positive number", "1.0 samples the policy as it is.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise refusal("max_grad_norm", self.max_grad_norm, "the trainer's, or null where nothing clips")
        if any(not 0 <= epsilon < math.inf for epsilon in self.clip_range):
            raise refusal("clip_range", list(self.clip_range), "the trainer's epsilon, below and above")
        for name in ("max_new_tokens", "chunk_size", "sequences_per_block", "memory_budget"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise refusal(name, value, "at least 1")
        if not -(2**63) <= self.seed < 2**63:
            raise refusal("seed", self.seed, "a whole number of 64 bits")

    def __repr__(self) -> str:
        """Return the fields that are not the default's."""
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        return record_line(self, usual | (DEMO_FIELDS if self.checkpoint == DEMO else {}))

    def _take_from_the_demo(self) -> None:
        for name, value in DEMO_FIELDS.items():
            if getattr(self, name) is OF_THE_DEMO:
                object.__setattr__(self, name, value)

    def _check_types(self) -> None:
        """Hold values given in Python to the types of those in a file, and make tuples of lists.

        What was not given and is nobody's default stays as it is, for ``_check_present``.
        """
        kinds = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is OF_THE_DEMO:
                continue
            try:
                value = TypeAdapter(kinds[field.name]).validate_python(self._plain(field.name, value))
            except ValidationError as error:
                raise first_type_error(field.name, error) from error
            object.__setattr__(self, field.name, value)

    def _plain(self, name: str, value: Any) -> Any:
        names = [field.name for field in dataclasses.fields(self)]
        if name == "update":
            return plain_request(name, value, names)
        if name == "evaluations":
            if not isinstance(value, (list, tuple)):
                raise refusal(name, value, "a list of batches", "Put the one batch into [ ].")
            return [plain_request(f"{name}[{i}]", request, names) for i, request in enumerate(value)]
        return value

    def _check_present(self) -> None:
        """Refuse a plan that leaves to the demo what another training is like."""
        batches = (self.update, *self.evaluations) if OF_THE_DEMO not in (self.update, self.evaluations) else ()
        needed = {
            "reward": not batches or any(isinstance(request, SampledBatch) for request in batches),
            "loss": not isinstance(self.update, RolloutFile),
        }
        for name, is_needed in needed.items():
            if getattr(self, name) is None and is_needed:
                raise refusal(name, None, "the training's", f"Add {ADDITIONS[name]}")
            if getattr(self, name) is OF_THE_DEMO and not is_needed:
                object.__setattr__(self, name, None)
        missing = [name for name in DEMO_FIELDS if getattr(self, name) is OF_THE_DEMO]
        if missing:
            *most, last = missing
            raise PlanError(
                f"{', '.join(most) + ' and ' if most else ''}{last} {'are' if most else 'is'} missing; expected what "
                f"only your training knows, since checkpoint is {self.checkpoint!r} and not the demo. "
                f"Add {', '.join(ADDITIONS[name] for name in missing)}"
            )

    def requests(self) -> tuple[BatchRequest, ...]:
        """U's request, then those of the evaluations."""
        return (self.update, *self.evaluations)

    def copies_of_a_direction(self) -> int:
        """How many times its size measuring along a direction takes: alone, with others, and added to the weights."""
        return 3

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON; ``from_dict`` gives the same plan back."""
        plain: dict[str, Any] = TypeAdapter(type(self)).dump_python(self, mode="json")
        return plain

    @classmethod
    def from_dict(cls: type[AnyPlan], values: dict[str, Any]) -> AnyPlan:
        """A plan from plain values; fields left out have their defaults. Raises ``PlanError`` naming a bad field."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict):
            raise refusal("the plan", values, f"fields with their values: {', '.join(names)}", "Write checkpoint: DIR")
        for name, value in values.items():
            if name not in names:
                raise unknown_field(str(name), value, names, _where_it_belongs(str(name), cls))
        return cls(**values)


@dataclass(frozen=True, repr=False)
class EntropyInfluencePlan(StepPlan):
    """Which rollouts and tokens of U move the entropy over each E, to first order and at finite steps.

    Fields beside those of ``StepPlan``; units: nats, and multiples of the optimizer's learning rate.
    ``estimator``, ``normalize``, ``preconditioner``: see ``fx.influence``. ``directions``: those that finite steps are
    taken along, by importance sampling; with none there are no finite steps, and nothing is computed for them.
    ``eta_multiples``: the steps that lines are fitted to; ``scaled_eta_multiples``: larger ones, at which a rollout
    whose step at the learning rate is lost in rounding can be seen. ``auto_scale``: a step is also chosen for each
    rollout so that its |Delta H| is this many times what float32 rounding of the weights makes (null: no such step).
    ``compare_float64``: every finite step once more in float64, which shows the rounding.
    ``second_order``: directions of the whole step whose d2H/deta2 is computed, about 13 forwards of E each; that of
    ``full`` says how far the first order holds (``eta_trust``). ``second_order_per_sequence``: d2H/deta2 along each
    rollout's directions too, as much for each. ``reward_influence``: also the influences on E's expected reward, where
    all of E is judged, about as much work as those on the entropy.

    Example:
        >>> plan = EntropyInfluencePlan.from_dict({"checkpoint": "demo", "seed": 3})
        >>> plan.seed, plan.eta_multiples
        (3, (0.2, 0.5, 1.0, 2.0, 5.0))
    """

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

        That of a rollout beside the baseline is read less the baseline's.
        """
        beside = self.second_order_per_sequence and "baseline_plus_grad" in self.directions
        return {*self.second_order, *(("baseline",) if beside else ())}

    def copies_of_a_direction(self) -> int:
        """Two more, twice as wide, where finite steps are also taken in float64."""
        return super().copies_of_a_direction() + (4 if self.compare_float64 else 0)

    def estimation(self) -> dict[str, Any]:
        """The arguments of ``fx.influence``, ``fx.jvp_delta`` and ``fx.snis_sweep`` that say how E is read."""
        return {
            "objective": Entropy(self.estimator, self.normalize),
            "temperature": self.temperature,
            "chunk_size": self.chunk_size,
        }


@dataclass(frozen=True, repr=False)
class FisherKernelPlan(StepPlan):
    """How U's rollouts, and the step that they make, move the log-probability of each rollout of E.

    Fields beside those of ``StepPlan``: ``preconditioner``, see ``fx.fisher_kernel``; ``top``: how many of U's rollouts
    are named for each rollout of E.

    Example:
        >>> FisherKernelPlan(preconditioner="identity").top
        5
    """

    preconditioner: Literal["adam", "identity"] = "adam"
    top: WholeNumber = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise refusal("top", self.top, "at least 1 rollout")


def _where_it_belongs(name: str, cls: type[StepPlan]) -> str:
    if name in REQUEST_FIELDS:
        return f"{name} is a field of a batch: put it into update or evaluations."
    for other, command in ((EntropyInfluencePlan, "run"), (FisherKernelPlan, "fisher")):
        if other is not cls and name in {field.name for field in dataclasses.fields(other)}:
            return f"{name} is a field of the plans of fx-influence {command}."
    return ""
