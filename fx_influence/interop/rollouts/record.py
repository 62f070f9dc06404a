"""Rollouts as records in memory: the prompt, the sampled completion and its reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fx_influence.core.display import record_line


@dataclass(frozen=True, repr=False)
class Rollout:
    """One prompt with one sampled completion.

    Attributes:
        id: unique among the rollouts that are stored together.
        prompt_id: name of the prompt.
        group: index of the prompt.
        prompt: text of the prompt.
        completion: text of the completion, without special tokens.
        prompt_ids: tokens that the policy saw.
        completion_ids: tokens that the policy sampled, a sampled end of sequence included.
        finished: whether the completion ended by an end-of-sequence token rather than by the length limit.
        behaviour_logprobs: log pi of each completion token under the policy that sampled it, at its temperature; None
            if they were not recorded.
        reward: None until it is computed.
        advantage: None until it is computed.
        completion_mask: False at tokens that the policy did not sample, such as a tool's output; None if all count.
        coefficients: c of each completion token, as a trainer's own loss gave them; None if they follow from the
            advantage.
        entropy_coefficients: b of each completion token, likewise.
        approximate: whether tokens or advantage were recomputed, not recorded.
        question: last user message of a conversation, which is shown to people as the prompt; None for a text.
        source: name of the data set or environment that the prompt comes from; None if nobody recorded it.
        extras: further values by name that the trainer recorded, such as what its reward function returned; None if it
            recorded none.

    Raises:
        ValueError: if a per-token value and ``completion_ids`` differ in length, and for a token id or a group that no
            tokenizer or file has.

    Example:
        >>> Rollout("0/0", "0", 0, "1+1=", "2", (4, 9, 4, 10), (5, 1), True, (-0.5, -0.25)).finished
        True
    """

    id: str
    prompt_id: str
    group: int
    prompt: str
    completion: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    finished: bool
    behaviour_logprobs: tuple[float, ...] | None = None
    reward: float | None = None
    advantage: float | None = None
    completion_mask: tuple[bool, ...] | None = None
    coefficients: tuple[float, ...] | None = None
    entropy_coefficients: tuple[float, ...] | None = None
    approximate: bool = False
    question: str | None = None
    source: str | None = None
    extras: Mapping[str, str | int | float | bool] | None = dataclasses.field(default=None, hash=False)

    @property
    def display_prompt(self) -> str:
        """Return the text that is shown to people as the prompt: the question of a conversation, or else the prompt."""
        return self.question or self.prompt

    def __post_init__(self) -> None:
        for name in PER_TOKEN:
            values = getattr(self, name)
            if values is not None and len(values) != len(self.completion_ids):
                raise ValueError(
                    f"{name} of rollout {self.id!r} has {len(values)} values; expected {len(self.completion_ids)}, "
                    "one for each completion token"
                )
        for name in ("prompt_ids", "completion_ids"):
            require_token_ids(f"{name} of rollout {self.id!r}", getattr(self, name))
        if not -(2**63) <= self.group < 2**63:
            raise ValueError(
                f"group of rollout {self.id!r} is {self.group}; expected a number of 64 bits. Repair it first"
            )

    def __repr__(self) -> str:
        return record_line(self, {f.name: f.default for f in dataclasses.fields(self)})


MAX_TOKEN_ID = 2**31
"""A number that no token id reaches; torch has no integers from 2^63 on."""

PER_TOKEN = ("behaviour_logprobs", "completion_mask", "coefficients", "entropy_coefficients")
"""Fields that hold one value per completion token, or None."""

SOURCE_COLUMNS = ("source", "data_source", "environment")
"""Columns of data sets that can name the source of a prompt; the first one that does is taken."""

MAX_SOURCE = 100
"""Characters of the longest name of a source: a longer text in such a column is content, as one to summarise."""


def source_of(columns: Mapping[str, Any]) -> str | None:
    """Return the data source or environment that a record names, or None.

    Only a printable text of 1 to ``MAX_SOURCE`` characters is a name.

    Args:
        columns: of the record, by name.

    Example:
        >>> source_of({"prompt": "1+1=", "data_source": "openai/gsm8k"})
        'openai/gsm8k'
    """
    values = (columns.get(name) for name in SOURCE_COLUMNS)
    return next((x for x in values if isinstance(x, str) and 0 < len(x) <= MAX_SOURCE and x.isprintable()), None)


def extras_of(record: Mapping[str, Any], known: Sequence[str]) -> dict[str, str | int | float | bool] | None:
    """Return the fields of a record beside ``known`` ones that hold a text, a finite number or a boolean; None if none.

    Example:
        >>> extras_of({"score": 1.0, "acc": 0.5, "pred": None}, ["score"])
        {'acc': 0.5}
    """
    extras = {
        name: value for name, value in record.items() if name not in known and type(value) in (str, int, float, bool)
    }
    return extras or None


def require_token_ids(subject: str, ids: Sequence[int]) -> None:
    """Raise ``ValueError``, naming ``subject``, for a number that is no token id."""
    bad = next((i for i in ids if not 0 <= i < MAX_TOKEN_ID), None)
    if bad is not None:
        raise ValueError(f"{subject} holds {bad}; expected token ids from 0 to 2^31 - 1. Repair it first")


def require_unicode(name: str, text: str) -> None:
    """Raise ``ValueError`` for half of a surrogate pair in a text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"field {name!r} holds half of a surrogate pair at {error.start}; expected valid Unicode. Repair it first"
        ) from error


def number_prompts(rollouts: Iterable[tuple[Rollout, Hashable]]) -> list[Rollout]:
    """Give the prompts of rollouts numbers in order of appearance, and set ``prompt_id`` and ``group`` to that number.

    Args:
        rollouts: pairs of a rollout and a key that tells its prompt from others.
    """
    numbers: dict[Hashable, int] = {}
    groups = [(rollout, numbers.setdefault(prompt, len(numbers))) for rollout, prompt in rollouts]
    return [dataclasses.replace(rollout, prompt_id=str(group), group=group) for rollout, group in groups]
