"""The batches that a plan can ask for: sampled from prompts, one sequence written out, or a file of rollouts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Discriminator, SerializerFunctionWrapHandler, Tag, model_serializer


class PlanError(ValueError):
    """A plan that cannot be run, with the field, the value and the remedy."""


@dataclass(frozen=True)
class SampledBatch:
    """Rollouts to be sampled from the policy: of all prompts, of those with given ids, or of some drawn at random.

    ``prompts``: a .jsonl, .parquet or .txt file, see ``interop.prompts.read_prompts``, or the prompts themselves, each
    a text or an object with ``"prompt"``, optionally ``"id"``, and the columns that the reward needs. ``chat``: plain
    texts, GSM8K's questions among them, are what a user says, and the tokenizer's chat template makes the prompt; lists
    of messages are that in any case. ``system``: a message before each such conversation. ``prompt_ids``: the prompts
    to take, by id, in this order (None: all). ``num_prompts``: how many of those to draw (None: all).
    ``completions_per_prompt``: of each. ``resample_zero_advantage``: rounds in which prompts whose completions all
    earned the same are sampled again; for update batches only, since it would bias an evaluation. ``seed``: None
    derives one from the plan's.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    prompts: str | tuple[str | dict[str, Any], ...]
    prompt_ids: tuple[str, ...] | None = None
    num_prompts: int | None = None
    completions_per_prompt: int = 8
    resample_zero_advantage: int = 0
    seed: int | None = None
    chat: bool = False
    system: str | None = None

    # Without conversations a plan is written as it was before there were any, so that a stored run is continued.
    @model_serializer(mode="wrap")
    def _without_chat(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        absent = {"chat": False, "system": None}
        return {name: value for name, value in plain(self).items() if name not in absent or value != absent[name]}


@dataclass(frozen=True)
class CustomSequence:
    """One completion written out, such as an answer one wishes the policy had given.

    As U, a step on this sequence alone with ``advantage``. As E, the entropy along its tokens: one path, so nothing is
    averaged over and there is no error bar. ``end``: append the end-of-sequence token.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    prompt: str
    completion: str
    advantage: float = 1.0
    end: bool = True


@dataclass(frozen=True)
class RolloutFile:
    """Rollouts sampled from this policy elsewhere, in any format of ``fx.read_rollouts``.

    As U, a rollout without an advantage gets the group-relative one of its reward, rollouts that all have coefficients
    of their own keep those, and rollouts of an older policy enter the loss by their ratio to it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    rollouts: str


def _kind(value: Any) -> str:
    if isinstance(value, RolloutFile) or (isinstance(value, dict) and "rollouts" in value):
        return "RolloutFile"
    if isinstance(value, CustomSequence) or (isinstance(value, dict) and "completion" in value):
        return "CustomSequence"
    return "SampledBatch"


BatchRequest = Annotated[
    Annotated[SampledBatch, Tag("SampledBatch")]
    | Annotated[CustomSequence, Tag("CustomSequence")]
    | Annotated[RolloutFile, Tag("RolloutFile")],
    Discriminator(_kind),
]
"""In YAML: an object with ``rollouts`` is a file, one with ``completion`` a sequence, any other is sampled."""

REQUEST_KINDS = ("SampledBatch", "CustomSequence", "RolloutFile")


def check_request(name: str, request: BatchRequest, update: bool) -> None:
    """Raise ``PlanError`` for numbers out of range; ``name`` is the field of the plan."""
    if isinstance(request, CustomSequence) and update and not 0 < abs(request.advantage) < math.inf:
        raise PlanError(
            f"{name}.advantage is {request.advantage}; give a finite number other than 0, or it moves nothing"
        )
    if not isinstance(request, SampledBatch):
        return
    if request.completions_per_prompt < 1 or (request.num_prompts is not None and request.num_prompts < 1):
        raise PlanError(f"{name} is {request.num_prompts} prompts x {request.completions_per_prompt}; use at least 1")
    if request.resample_zero_advantage < 0:
        raise PlanError(f"{name}.resample_zero_advantage is {request.resample_zero_advantage}; give 0 rounds or more")
    if request.resample_zero_advantage and not update:
        raise PlanError(f"{name}.resample_zero_advantage is {request.resample_zero_advantage}; use 0, it biases E")
    if request.prompts == () or request.prompt_ids == ():
        raise PlanError(f"{name} names no prompt; give at least one, or leave prompt_ids out for all of them")


def with_paths(request: BatchRequest, absolute: Callable[[str], str]) -> BatchRequest:
    """The request with ``absolute`` applied to the file that it reads, if it reads one."""
    if isinstance(request, RolloutFile):
        return RolloutFile(absolute(request.rollouts))
    if isinstance(request, SampledBatch) and isinstance(request.prompts, str):
        return dataclasses.replace(request, prompts=absolute(request.prompts))
    return request
