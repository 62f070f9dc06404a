"""Define the fields that plans of all experiments share: one training state and its batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fx_influence.autodiff.ghost import default_budget
from fx_influence.core.display import record_line
from fx_influence.interop.runtime.renamed import current_plan
from fx_influence.lab.plan.batch_request import (
    REQUEST_FIELDS,
    REQUEST_KINDS,
    BatchRequest,
    Number,
    RolloutFile,
    SampledBatch,
    WholeNumber,
    check_request,
    plain_request,
)
from fx_influence.lab.plan.demo import DEMO, DEMO_DEFAULT, DEMO_FIELDS, LINES_TO_ADD
from fx_influence.lab.plan.errors import PlanError, refusal, type_refusal, unknown_field
from fx_influence.types import LossType, Params

Dtype = Literal["auto", "float32", "float64", "bfloat16"]
AnyPlan = TypeVar("AnyPlan", bound="StepPlan")


@dataclass(frozen=True, repr=False)
class StepPlan:
    """One training state and its batches: what every experiment begins with.

    ``update``, ``evaluations``, ``reward``, ``loss`` and ``max_new_tokens`` have the embedded training run's values
    where ``checkpoint`` is ``demo``. With any other checkpoint they must be given, except ``reward`` where nothing is
    sampled and ``loss`` where ``update`` is a file, whose rollouts may have coefficients: both are None then. The
    defaults of ``scale_advantages``, ``clip_range``, ``max_grad_norm`` and ``temperature`` are those of trainers (TRL,
    verl); the other defaults do not depend on the training run. Learning rates, betas and weight decay are the
    optimizer state's own.

    Args:
        checkpoint: directory of the training state, or ``demo``.
        base: directory of the base model, where the checkpoint is an adapter's.
        dtype: of the weights as they are read; half precision is raised to float32 for computing.
        device: ``cpu``, or ``cuda``.
        reward: ``module:function``, see ``interop.rewards``.
        loss: the trainer's, see ``fx.coefficients``.
        scale_advantages: advantages are divided by the standard deviation of the prompt's rewards.
        clip_range: epsilon below and above; counts where U is of an older policy.
        max_grad_norm: norm that the trainer clips gradients to; None: nothing is clipped.
        temperature: that completions are sampled and scored with.
        max_new_tokens: length of the longest completion.
        update: U, the rollouts of the step.
        evaluations: one or more E, fresh rollouts that are measured on.
        chunk_size: rows per forward; None chooses by the number of tokens.
        sequences_per_block: number of rollouts of U, at most, whose finite steps are taken and stored together.
        memory_budget: bytes of per-sequence gradients and directions in memory at once; None as ``fx.influence``.
        seed: of all sampling.

    Raises:
        PlanError: for a field that is missing, unknown, of another type or out of range.
    """

    command: ClassVar[str] = "run"
    """The command of ``fx-influence`` that takes plans of this kind."""
    old_fields: ClassVar[Mapping[str, str]] = {}
    """Names of fields in version 0.1 -> present names."""

    checkpoint: str = DEMO
    base: str | None = None
    dtype: Dtype = "auto"
    device: str = "cpu"
    reward: str | None = DEMO_DEFAULT
    loss: LossType | None = DEMO_DEFAULT
    scale_advantages: bool = True
    clip_range: tuple[Number, Number] = (0.2, 0.2)
    max_grad_norm: Number | None = 1.0
    temperature: Number = 1.0
    max_new_tokens: WholeNumber = DEMO_DEFAULT
    update: BatchRequest = DEMO_DEFAULT
    evaluations: tuple[BatchRequest, ...] = DEMO_DEFAULT
    chunk_size: WholeNumber | None = None
    sequences_per_block: WholeNumber = 8
    memory_budget: WholeNumber | None = None
    seed: WholeNumber = 0

    def __post_init__(self) -> None:
        if self.checkpoint == DEMO:
            self._fill_in_demo_values()
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
        """Return the fields that differ from their defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return record_line(self, defaults | (DEMO_FIELDS if self.checkpoint == DEMO else {}))

    def requests(self) -> tuple[BatchRequest, ...]:
        """Return U's request, then those of the evaluations."""
        return (self.update, *self.evaluations)

    def budget(self, params: Params) -> int:
        """Return ``memory_budget``, or the default for these parameters, bytes."""
        return default_budget(params) if self.memory_budget is None else self.memory_budget

    def copies_of_a_direction(self) -> int:
        """Return the memory that measuring along a direction takes, in sizes of the direction.

        Its copies are the direction itself, its row in a block of directions, and its sum with the weights.
        """
        return 3

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for YAML and JSON; ``from_dict`` makes the same plan of them."""
        plain: dict[str, Any] = TypeAdapter(type(self)).dump_python(self, mode="json")
        return plain

    @classmethod
    def from_dict(cls: type[AnyPlan], values: dict[str, Any]) -> AnyPlan:
        """Return the plan of plain values; fields left out have their defaults.

        Fields that version 0.1 named otherwise are read too, see ``interop.runtime.renamed``.

        Raises:
            PlanError: naming the field that is unknown, of another type or out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict):
            raise refusal("the plan", values, f"fields with their values: {', '.join(names)}", "Write checkpoint: DIR")
        try:
            values = current_plan(values, cls.old_fields)
        except ValueError as error:
            raise PlanError(str(error)) from error
        for name, value in values.items():
            if name not in names:
                raise unknown_field(str(name), value, names, _place_of_field(str(name), cls))
        return cls(**values)

    def _fill_in_demo_values(self) -> None:
        for name, value in DEMO_FIELDS.items():
            if getattr(self, name) is DEMO_DEFAULT:
                object.__setattr__(self, name, value)

    def _check_types(self) -> None:
        """Require the same types of values given in Python as in a file, and turn lists into tuples.

        A field that was not given and has no default stays as it is, for ``_check_present``.
        """
        types = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is DEMO_DEFAULT:
                continue
            try:
                value = TypeAdapter(types[field.name]).validate_python(self._plain(field.name, value))
            except ValidationError as error:
                raise type_refusal(field.name, error, REQUEST_KINDS) from error
            object.__setattr__(self, field.name, value)

    def _plain(self, name: str, value: Any) -> Any:
        """Return a batch request, or the list of them, as plain values, and any other value unchanged."""
        names = [field.name for field in dataclasses.fields(self)]
        if name == "update":
            return plain_request(name, value, names)
        if name == "evaluations":
            if not isinstance(value, (list, tuple)):
                raise refusal(name, value, "a list of batches", "Put the one batch into [ ].")
            return [plain_request(f"{name}[{i}]", request, names) for i, request in enumerate(value)]
        return value

    def _check_present(self) -> None:
        """Raise ``PlanError`` if fields that describe another training run are left to the demo's values."""
        batches = (self.update, *self.evaluations) if DEMO_DEFAULT not in (self.update, self.evaluations) else ()
        needed = {
            "reward": not batches or any(isinstance(request, SampledBatch) for request in batches),
            "loss": not isinstance(self.update, RolloutFile),
        }
        for name, is_needed in needed.items():
            if getattr(self, name) is None and is_needed:
                raise refusal(name, None, "the training run's", f"Add {LINES_TO_ADD[name]}")
            if getattr(self, name) is DEMO_DEFAULT and not is_needed:
                object.__setattr__(self, name, None)
        missing = [name for name in DEMO_FIELDS if getattr(self, name) is DEMO_DEFAULT]
        if missing:
            *others, last = missing
            raise PlanError(
                f"{', '.join(others) + ' and ' if others else ''}{last} {'are' if others else 'is'} missing; expected "
                f"what only your training knows, since checkpoint is {self.checkpoint!r} and not the demo. "
                f"Add {', '.join(LINES_TO_ADD[name] for name in missing)}"
            )


def _place_of_field(name: str, plan_type: type[StepPlan]) -> str:
    """Return a sentence that says where a field unknown to ``plan_type`` belongs; empty where nothing has it."""
    if name in REQUEST_FIELDS:
        return f"{name} is a field of a batch: put it into update or evaluations."
    for other in StepPlan.__subclasses__():
        if other is not plan_type and name in {field.name for field in dataclasses.fields(other)}:
            return f"{name} is a field of the plans of fx-influence {other.command}."
    return ""
