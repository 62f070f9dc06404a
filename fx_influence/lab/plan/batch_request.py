"""Define the batches that a plan can ask for: sampled from prompts, one sequence written out, a file of rollouts."""

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


def _refuse_bool(value: Any) -> Any:
    # bool is a subclass of int in Python, so pydantic would take true for 1.
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value


def _id_as_text(value: Any) -> Any:
    # A file of prompts may number its ids, and YAML reads an unquoted 7 as a number.
    return str(value) if type(value) is int else value


WholeNumber = Annotated[int, BeforeValidator(_refuse_bool)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]
PromptId = Annotated[str, BeforeValidator(_id_as_text)]


@dataclass(frozen=True, repr=False)
class SampledBatch:
    """Rollouts to be sampled from the policy, for all prompts, those with given ids, or some drawn at random.

    Args:
        prompts: a .jsonl, .parquet or .txt file, see ``interop.prompts.read_prompts``, or the prompts themselves, each
            a text or an object with ``"prompt"``, optionally ``"id"``, and the columns that the reward needs.
        prompt_ids: ids of the prompts to take, in this order; None: all.
        num_prompts: number of those to draw at random; None: all.
        completions_per_prompt: number of completions sampled of each prompt.
        resample_zero_advantage: number of rounds in which prompts whose completions all earned the same are sampled
            again; for update batches only, since it would bias an evaluation.
        seed: of this batch; None derives one from the plan's.
        chat: a plain text, GSM8K's questions among them, is what a user says, and the tokenizer's chat template makes
            the prompt of it; lists of messages are conversations in any case.
        system: a system message before each such conversation.
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

    # Fields of conversations are written only where they are used, so that the text of older plans, by which their
    # runs are found and continued, stays the same.
    @model_serializer(mode="wrap")
    def _without_chat_defaults(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        absent = {"chat": False, "system": None}
        return {name: value for name, value in plain(self).items() if name not in absent or value != absent[name]}

    def __repr__(self) -> str:
        return record_line(self, {f.name: f.default for f in dataclasses.fields(self)})


@dataclass(frozen=True, repr=False)
class CustomSequence:
    """One completion written out, such as an answer one wishes the policy had given.

    As U it is a step on this sequence alone. As E it is the entropy along its tokens: one path, so nothing is averaged
    over and there is no error bar.

    Args:
        prompt: the text before the completion.
        completion: the text whose tokens are scored.
        advantage: of the one rollout, as U; other than 0.
        end: append the end-of-sequence token.
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
    """Rollouts sampled from this policy elsewhere.

    As U, a rollout without an advantage gets the group-relative one of its reward, rollouts that all have coefficients
    keep them, and rollouts of an older policy enter the loss by their ratio to it.

    Args:
        rollouts: path of a file in any format of ``fx.read_rollouts``.
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
"""A batch in YAML: an object with ``rollouts`` is a file, with ``completion`` a sequence, with ``prompts`` a sample."""

KINDS: dict[str, type[SampledBatch] | type[CustomSequence] | type[RolloutFile]] = {
    "rollouts": RolloutFile,
    "completion": CustomSequence,
    "prompts": SampledBatch,
}
"""Kind of batch request by the field that only this kind has."""
REQUESTS = tuple(KINDS.values())
REQUEST_KINDS = tuple(kind.__name__ for kind in REQUESTS)
REQUEST_FIELDS = tuple(dict.fromkeys(f.name for kind in REQUESTS for f in dataclasses.fields(kind)))
EXPECTED_BATCH = (
    "an object with prompts (to be sampled), with rollouts (a file of them), or with prompt and completion (one "
    "written out)"
)


def plain_request(name: str, value: Any, plan_fields: Iterable[str]) -> dict[str, Any]:
    """Return the fields of a batch request as a dictionary, once they are those of exactly one kind.

    Args:
        name: field of the plan that the request is the value of.
        value: an object with the fields, or a request already made.
        plan_fields: names of the plan's own fields, for the remedy where the request has one of them.

    Raises:
        PlanError: for a value that is not an object, for fields of no kind or of two kinds, and for a required field
            that is missing.

    Example:
        >>> plain_request("update", {"rolouts": "r.jsonl"}, ["seed"])
        Traceback (most recent call last):
        fx_influence.lab.plan.errors.PlanError: update.rolouts is 'r.jsonl'; expected one of the fields rollouts,
        prompt, completion, advantage, end, prompts, prompt_ids, num_prompts, completions_per_prompt,
        resample_zero_advantage, seed, chat, system (the nearest is 'rollouts'). Rename or remove it.
    """
    if isinstance(value, REQUESTS):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if not isinstance(value, Mapping):
        remedy = f"Write {{prompts: {value}}}" if isinstance(value, str) else ""
        raise refusal(name, value, EXPECTED_BATCH, remedy)
    markers = [marker for marker in KINDS if marker in value]
    if len(markers) > 1:
        raise refusal(name, dict(value), f"one of {' and '.join(markers)}, not both", "Remove one of them.")
    kind = KINDS[markers[0]] if markers else None
    known = REQUEST_FIELDS if kind is None else tuple(f.name for f in dataclasses.fields(kind))
    for field, field_value in value.items():
        if field not in known:
            remedy = f"{field} is a field of the plan itself: put it beside {name.partition('[')[0]}."
            raise unknown_field(f"{name}.{field}", field_value, known, remedy if field in set(plan_fields) else "")
    if kind is None:
        raise refusal(name, dict(value), EXPECTED_BATCH, "Add one of these.")
    for known_field in dataclasses.fields(kind):
        if known_field.default is dataclasses.MISSING and known_field.name not in value:
            raise PlanError(f"{name}.{known_field.name} is missing; expected a text. Add it beside {markers[0]}.")
    if kind is SampledBatch:
        _check_prompts(f"{name}.prompts", value["prompts"])
    return dict(value)


def _check_prompts(name: str, prompts: Any) -> None:
    if isinstance(prompts, str):
        return
    if not isinstance(prompts, (list, tuple)):
        raise refusal(name, prompts, "the path of a file, or a list of prompts", "Put the prompts into [ ].")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, Mapping)):
            expected = 'a text, or an object such as {prompt: "1+1=", answer: "2"}'
            raise refusal(f"{name}[{i}]", prompt, expected, f"Quote it where it is a text: {str(prompt)!r}")


def check_request(name: str, request: BatchRequest, update: bool) -> None:
    """Raise ``PlanError`` for numbers out of range.

    Args:
        name: field of the plan that the request is the value of.
        request: the batch asked for.
        update: whether it is U; an evaluation may not be resampled, which would bias it.
    """
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
    """Return the request with ``absolute`` applied to the path of the file that it reads, if it reads one."""
    if isinstance(request, RolloutFile):
        return RolloutFile(absolute(request.rollouts))
    if isinstance(request, SampledBatch) and isinstance(request.prompts, str):
        return dataclasses.replace(request, prompts=absolute(request.prompts))
    return request
