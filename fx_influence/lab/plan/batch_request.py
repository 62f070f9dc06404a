"""The batches that a plan can ask for: sampled from prompts, one sequence written out, or a file of rollouts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
)

from fx_influence.core.display import record_line
from fx_influence.lab.plan.errors import PlanError, refusal, unknown_field


def _no_truth_value(value: Any) -> Any:
    # Python, and so pydantic, takes true for 1.
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value


def _text_of_number(value: Any) -> Any:
    # A file of prompts may name them by number, and YAML reads 7 as one.
    return str(value) if type(value) is int else value


WholeNumber = Annotated[int, BeforeValidator(_no_truth_value)]
Number = Annotated[float, BeforeValidator(_no_truth_value)]
PromptId = Annotated[str, BeforeValidator(_text_of_number)]


@dataclass(frozen=True, repr=False)
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
    prompt_ids: tuple[PromptId, ...] | None = None
    num_prompts: WholeNumber | None = None
    completions_per_prompt: WholeNumber = 8
    resample_zero_advantage: WholeNumber = 0
    seed: WholeNumber | None = None
    chat: bool = False
    system: str | None = None

    # Without conversations a plan is written as it was before there were any, so that a stored run is continued.
    @model_serializer(mode="wrap")
    def _without_chat(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        absent = {"chat": False, "system": None}
        return {name: value for name, value in plain(self).items() if name not in absent or value != absent[name]}

    def __repr__(self) -> str:
        return record_line(self, {f.name: f.default for f in dataclasses.fields(self)})


@dataclass(frozen=True, repr=False)
class CustomSequence:
    """One completion written out, such as an answer one wishes the policy had given.

    As U, a step on this sequence alone with ``advantage``. As E, the entropy along its tokens: one path, so nothing is
    averaged over and there is no error bar. ``end``: append the end-of-sequence token.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    prompt: str
    completion: str
    advantage: Number = 1.0
    end: bool = True

    def __repr__(self) -> str:
        return record_line(self, {f.name: f.default for f in dataclasses.fields(self)})


@dataclass(frozen=True, repr=False)
class RolloutFile:
    """Rollouts sampled from this policy elsewhere, in any format of ``fx.read_rollouts``.

    As U, a rollout without an advantage gets the group-relative one of its reward, rollouts that all have coefficients
    of their own keep those, and rollouts of an older policy enter the loss by their ratio to it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    rollouts: str

    def __repr__(self) -> str:
        return record_line(self, {f.name: f.default for f in dataclasses.fields(self)})


def _kind(value: Any) -> str:
    if isinstance(value, REQUESTS):
        return type(value).__name__
    return next((kind.__name__ for marker, kind in KINDS.items() if marker in value), "SampledBatch")


BatchRequest = Annotated[
    Annotated[SampledBatch, Tag("SampledBatch")]
    | Annotated[CustomSequence, Tag("CustomSequence")]
    | Annotated[RolloutFile, Tag("RolloutFile")],
    Discriminator(_kind),
]
"""In YAML: an object with ``rollouts`` is a file, one with ``completion`` a sequence, with ``prompts`` a sample."""

KINDS: dict[str, type[SampledBatch] | type[CustomSequence] | type[RolloutFile]] = {
    "rollouts": RolloutFile,
    "completion": CustomSequence,
    "prompts": SampledBatch,
}
"""The field that tells a kind of request from the others, and the kind."""
REQUESTS = tuple(KINDS.values())
REQUEST_KINDS = tuple(kind.__name__ for kind in REQUESTS)
REQUEST_FIELDS = tuple(dict.fromkeys(f.name for kind in REQUESTS for f in dataclasses.fields(kind)))
ONE_OF_THEM = (
    "an object with prompts (to be sampled), with rollouts (a file of them), or with prompt and completion (one "
    "written out)"
)


def plain_request(name: str, value: Any, plan_fields: Iterable[str]) -> dict[str, Any]:
    """Return the fields of a request, which may be one already, once they are those of exactly one kind.

    ``name``: the field of the plan that it is the value of. ``plan_fields``: those of the plan, for the remedy.
    Raises ``PlanError`` for what is no object, for fields of no kind or of two, and for one that is missing.

    Example:
        >>> plain_request("update", {"rolouts": "r.jsonl"}, ["seed"])
        Traceback (most recent call last):
        fx_influence.lab.plan.errors.PlanError: update.rolouts is 'r.jsonl'; expected one of the fields rollouts,
        prompt, completion, advantage, end, prompts, prompt_ids, num_prompts, completions_per_prompt,
        resample_zero_advantage, seed, chat, system. Did you mean rollouts?
    """
    if isinstance(value, REQUESTS):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if not isinstance(value, Mapping):
        remedy = f"Write {{prompts: {value}}}" if isinstance(value, str) else ""
        raise refusal(name, value, ONE_OF_THEM, remedy)
    markers = [marker for marker in KINDS if marker in value]
    if len(markers) > 1:
        raise refusal(name, dict(value), f"one of {' and '.join(markers)}, not both", "Remove one of them.")
    kind = KINDS[markers[0]] if markers else None
    known = REQUEST_FIELDS if kind is None else tuple(f.name for f in dataclasses.fields(kind))
    for field, given in value.items():
        if field not in known:
            remedy = f"{field} is a field of the plan itself: put it beside {name.partition('[')[0]}."
            raise unknown_field(f"{name}.{field}", given, known, remedy if field in set(plan_fields) else "")
    if kind is None:
        raise refusal(name, dict(value), ONE_OF_THEM, "Add one of these.")
    for field_of in dataclasses.fields(kind):
        if field_of.default is dataclasses.MISSING and field_of.name not in value:
            raise PlanError(f"{name}.{field_of.name} is missing; expected a text. Add it beside {markers[0]}.")
    if kind is SampledBatch:
        _check_prompts(f"{name}.prompts", value["prompts"])
    return dict(value)


def _check_prompts(name: str, prompts: Any) -> None:
    if isinstance(prompts, str):
        return
    if not isinstance(prompts, (list, tuple)):
        raise refusal(name, prompts, "the path of a file, or a list of prompts", "Put what is asked into [ ].")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, Mapping)):
            expected = 'a text, or an object such as {prompt: "1+1=", answer: "2"}'
            raise refusal(f"{name}[{i}]", prompt, expected, f"Quote it where it is a text: {str(prompt)!r}")


def check_request(name: str, request: BatchRequest, update: bool) -> None:
    """Raise ``PlanError`` for numbers out of range; ``name`` is the field of the plan."""
    if isinstance(request, CustomSequence) and update and not 0 < abs(request.advantage) < math.inf:
        raise refusal(f"{name}.advantage", request.advantage, "a finite number other than 0", "0 moves nothing.")
    if not isinstance(request, SampledBatch):
        return
    for field in ("completions_per_prompt", "num_prompts"):
        if (count := getattr(request, field)) is not None and count < 1:
            raise refusal(f"{name}.{field}", count, "at least 1")
    if request.resample_zero_advantage < 0:
        raise refusal(f"{name}.resample_zero_advantage", request.resample_zero_advantage, "0 rounds or more")
    if request.resample_zero_advantage and not update:
        raise refusal(f"{name}.resample_zero_advantage", request.resample_zero_advantage, "0", "It would bias E.")
    for field in ("prompts", "prompt_ids"):
        if getattr(request, field) in ((), ""):
            remedy = "Name at least one, or leave prompt_ids out for all of them." if field == "prompt_ids" else ""
            raise refusal(f"{name}.{field}", getattr(request, field), "at least one prompt", remedy)


def with_paths(request: BatchRequest, absolute: Callable[[str], str]) -> BatchRequest:
    """The request with ``absolute`` applied to the file that it reads, if it reads one."""
    if isinstance(request, RolloutFile):
        return RolloutFile(absolute(request.rollouts))
    if isinstance(request, SampledBatch) and isinstance(request.prompts, str):
        return dataclasses.replace(request, prompts=absolute(request.prompts))
    return request
