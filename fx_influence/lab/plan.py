"""What a run measures, as a value that is written to and read from YAML; a stored plan repeats its run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from fx_influence.kernel import MEMORY_BUDGET
from fx_influence.lab.requests import REQUEST_KINDS, BatchRequest, PlanError, SampledBatch, check_request, with_paths
from fx_influence.types import Estimator, Gain, LossType, Normalize

DEMO = "demo"
"""Stands for the embedded checkpoint, or with ``demo/train`` and ``demo/eval`` for its prompt files."""
DEMO_DIRECTORY = Path(__file__).parent / "demo"

Dtype = Literal["auto", "float32", "float64", "bfloat16"]
Direction = Literal["full", "baseline", "momentum", "weight_decay", "rmsprop", "grad", "baseline_plus_grad"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
PER_SEQUENCE: tuple[str, ...] = ("grad", "baseline_plus_grad")
"""Directions of every rollout of U: v_i, and v_baseline + v_i."""
WHOLE: tuple[str, ...] = tuple(name for name in DIRECTIONS if name not in PER_SEQUENCE)
"""Directions of the whole step; ``rmsprop`` has neither momentum nor decay."""
AnyPlan = TypeVar("AnyPlan", bound="StepPlan")


@dataclass(frozen=True)
class StepPlan:
    """One training state and its batches: what every experiment begins with.

    ``checkpoint``: a directory, or ``demo``; ``base``: the base model of an adapter. ``dtype``: of the weights; what is
    in half precision is computed with in float32. ``reward``: ``module:function``, see ``interop.rewards``. ``loss``,
    ``scale_advantages``, ``max_grad_norm``, ``temperature``, ``max_new_tokens``: as in the training run, and
    ``clip_range``, epsilon below and above, which counts where U is of an older policy. ``update``,
    ``evaluations``: the batches U and E, see ``lab.requests``. ``chunk_size``: rows per forward (null: by tokens).
    ``sequences_per_block``: how many rollouts of U, at most, have their finite steps taken and stored together.
    ``memory_budget``: bytes of per-sequence gradients and directions held at once. ``seed``: of all sampling.
    """

    checkpoint: str = DEMO
    base: str | None = None
    dtype: Dtype = "auto"
    device: str = "cpu"
    reward: str = "fx_influence.interop.rewards:exact_match"
    loss: LossType = "dr_grpo"
    scale_advantages: bool = True
    clip_range: tuple[float, float] = (0.2, 0.2)
    max_grad_norm: float | None = 1.0
    temperature: float = 1.0
    max_new_tokens: int = 20
    update: BatchRequest = SampledBatch("demo/train", num_prompts=16, completions_per_prompt=8)
    evaluations: tuple[BatchRequest, ...] = (SampledBatch("demo/eval", num_prompts=64, completions_per_prompt=4),)
    chunk_size: int | None = None
    sequences_per_block: int = 8
    memory_budget: int = MEMORY_BUDGET
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        if not self.evaluations:
            raise PlanError("evaluations is empty; name at least one batch of prompts to evaluate on")
        check_request("update", self.update, update=True)
        for i, request in enumerate(self.evaluations):
            check_request(f"evaluations[{i}]", request, update=False)
        if not 0 < self.temperature < math.inf or self.max_new_tokens < 1:
            raise PlanError(
                f"temperature is {self.temperature}, max_new_tokens {self.max_new_tokens}; both must be > 0 and finite"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise PlanError(f"max_grad_norm is {self.max_grad_norm}; give the trainer's, or null where nothing clips")
        if any(not 0 <= epsilon < math.inf for epsilon in self.clip_range):
            raise PlanError(f"clip_range is {list(self.clip_range)}; give the trainer's epsilon, below and above")
        for name in ("chunk_size", "sequences_per_block", "memory_budget"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise PlanError(f"{name} is {value}; give at least 1")

    def _check_types(self) -> None:
        """Values given in Python are held to the same types as those of a file, and lists become tuples."""
        kinds = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            try:
                value = TypeAdapter(kinds[field.name]).validate_python(getattr(self, field.name))
            except ValidationError as error:
                raise PlanError(f"{_first_error(field.name, error)}; {_known(type(self))}") from error
            object.__setattr__(self, field.name, value)

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
        if not isinstance(values, dict):
            raise PlanError(f"plan is {values!r}: give an object; {_known(cls)}")
        for name in values:
            if name not in {field.name for field in dataclasses.fields(cls)}:
                raise PlanError(f"{name} is {values[name]!r}: Unexpected field; {_known(cls)}")
        return cls(**values)


@dataclass(frozen=True)
class EntropyInfluencePlan(StepPlan):
    """Which rollouts and tokens of U move the entropy over each E, to first order and at finite steps.

    Fields beside those of ``StepPlan``; units: nats, and multiples of the optimizer's learning rate.
    ``estimator``, ``normalize``, ``gain``: see ``fx.influence``. ``directions``: those that finite steps are taken
    along, by importance sampling. ``eta_multiples``: the steps that lines are fitted to; ``scaled_eta_multiples``:
    larger ones, at which a rollout whose step at the learning rate is lost in rounding can be seen. ``auto_scale``: a
    step is also chosen for each rollout so that its |Delta H| is this many times what float32 rounding of the weights
    makes (null: no such step). ``compare_float64``: every finite step once more in float64, which shows the rounding.
    ``second_order_per_sequence``: d2H/deta2 along each rollout's directions too, about 13 forwards of E each.

    Example:
        >>> plan = EntropyInfluencePlan.from_dict({"checkpoint": "demo", "seed": 3})
        >>> plan.seed, plan.eta_multiples
        (3, (0.2, 0.5, 1.0, 2.0, 5.0))
    """

    estimator: Estimator = "per_decision"
    normalize: Normalize = "token"
    gain: Gain = "share"
    directions: tuple[Direction, ...] = DIRECTIONS
    eta_multiples: tuple[float, ...] = (0.2, 0.5, 1.0, 2.0, 5.0)
    scaled_eta_multiples: tuple[float, ...] = (20.0, 100.0)
    auto_scale: float | None = 100.0
    compare_float64: bool = False
    second_order_per_sequence: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        etas = self.eta_multiples + self.scaled_eta_multiples
        if not self.eta_multiples or any(not 0 < eta < math.inf for eta in etas):
            raise PlanError(
                f"eta_multiples is {list(self.eta_multiples)}, scaled_eta_multiples {list(self.scaled_eta_multiples)}; "
                "give positive multiples of the lr, at least one in the first"
            )
        if self.auto_scale is not None and not 0 < self.auto_scale < math.inf:
            raise PlanError(f"auto_scale is {self.auto_scale}; give a factor such as 100, or null for none")
        if "baseline_plus_grad" in self.directions and "baseline" not in self.directions:
            raise PlanError(
                f"directions is {list(self.directions)}; baseline_plus_grad is read less baseline: add baseline"
            )

    def copies_of_a_direction(self) -> int:
        """Two more, twice as wide, where finite steps are also taken in float64."""
        return super().copies_of_a_direction() + (4 if self.compare_float64 else 0)

    def estimation(self) -> dict[str, Any]:
        """The arguments of ``fx.influence``, ``fx.jvp_delta`` and ``fx.snis_sweep`` that say how E is read."""
        return {
            "estimator": self.estimator,
            "normalize": self.normalize,
            "temperature": self.temperature,
            "chunk_size": self.chunk_size,
        }


@dataclass(frozen=True)
class FisherKernelPlan(StepPlan):
    """How U's rollouts, and the step that they make, move the log-probability of each rollout of E.

    Fields beside those of ``StepPlan``: ``preconditioner``, see ``fx.fisher_kernel``; ``top``: how many of U's rollouts
    are named for each rollout of E.

    Example:
        >>> FisherKernelPlan(preconditioner="identity").top
        5
    """

    preconditioner: Literal["adam", "identity"] = "adam"
    top: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise PlanError(f"top is {self.top}; name at least 1 rollout")


def _first_error(name: str, error: ValidationError) -> str:
    # Of a choice of types every one says that it is not meant; the deepest error is inside the one that is.
    bad = max(error.errors(include_url=False), key=lambda found: len(found["loc"]))
    # Between the field and what is wrong in it stands the kind of request, which the file does not name.
    where = ".".join(str(part) for part in (name, *bad["loc"]) if part not in REQUEST_KINDS)
    return f"{where} is {bad['input']!r}: {bad['msg']}"


def _known(cls: type[StepPlan]) -> str:
    return "a plan's fields are " + ", ".join(f.name for f in dataclasses.fields(cls))


def read_plan(path: Path, kind: type[AnyPlan]) -> AnyPlan:
    """A plan from a YAML file; relative paths in it are relative to the file. Raises ``PlanError``."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanError(f"plan file {str(path)!r} does not exist; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"plan file {str(path)!r} is not YAML: {error}") from error
    return resolved(kind.from_dict(values or {}), path.resolve().parent)


def plan_text(plan: StepPlan) -> str:
    """The plan as YAML."""
    return yaml.safe_dump(plan.to_dict(), sort_keys=False, allow_unicode=True)


def demo_path(name: str) -> str:
    """Where ``demo``, ``demo/train`` and ``demo/eval`` lie; any other path unchanged."""
    known = {DEMO: "policy", f"{DEMO}/train": "train_prompts.jsonl", f"{DEMO}/eval": "eval_prompts.jsonl"}
    return str(DEMO_DIRECTORY / known[name]) if name in known else name


def resolved(plan: AnyPlan, folder: Path) -> AnyPlan:
    """The plan with its relative paths taken from ``folder``, so that it means the same wherever it is stored."""

    def absolute(path: str) -> str:
        return path if demo_path(path) != path else str((folder / path).resolve())

    return dataclasses.replace(
        plan,
        checkpoint=absolute(plan.checkpoint),
        base=None if plan.base is None else absolute(plan.base),
        update=with_paths(plan.update, absolute),
        evaluations=tuple(with_paths(request, absolute) for request in plan.evaluations),
    )
