"""Recorded texts and conversations tokenised again, which may give other tokens than those sampled."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fx_influence.interop.rollouts.record import Rollout, require_unicode

Message = dict[str, Any]
Segment = tuple[str, bool]
"""A segment of a completion, and whether the policy sampled it."""


@dataclass(frozen=True)
class Retokenizer:
    """Converter of recorded texts to rollouts.

    Attributes:
        tokenizer: the policy's tokenizer.
        max_completion_length: the trainer's limit in tokens; None if unknown.
        chat_template_kwargs: further arguments of the chat template.

    Raises:
        ValueError: without a tokenizer or its end of sequence.
    """

    tokenizer: Any
    max_completion_length: int | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer is None; expected the policy's own, since this file holds texts without token ids. Pass "
                "tokenizer=AutoTokenizer.from_pretrained(checkpoint)"
            )
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "tokenizer.eos_token is None; expected the token that ends a completion, to put it back. Set it"
            )

    def rollout(self, name: str, prompt: object, completion: object, truncated: bool | None) -> Rollout:
        """Make a rollout of two texts or two lists of messages.

        Args:
            name: id of the rollout.
            prompt: a text or a list of messages.
            completion: a text or a list of messages.
            truncated: whether the completion was cut off, as the record says; None if it says nothing.

        Raises:
            ValueError: for anything else, and for messages that the chat template cannot render one after another.
        """
        messages = None if isinstance(prompt, str) else _messages("prompt", prompt)
        text = prompt if isinstance(prompt, str) else self.render(messages or [], True)
        # A chat template writes the beginning of the sequence itself; a plain text gets it from the tokenizer.
        prompt_ids = self.encode("prompt", text, special=messages is None)
        rollout = self.continued(name, text, prompt_ids, self._segments(messages, completion), truncated)
        return dataclasses.replace(rollout, completion=completion) if isinstance(completion, str) else rollout

    def continued(
        self, name: str, prompt: str, prompt_ids: Sequence[int], segments: Sequence[Segment], truncated: bool | None
    ) -> Rollout:
        """Make a rollout of a tokenised prompt and the segments of its completion.

        Args:
            name: id of the rollout.
            prompt: text of the prompt.
            prompt_ids: its tokens.
            segments: of the completion, without the end of a sequence that the policy finished.
            truncated: whether the completion was cut off, as the record says; None if it says nothing.

        Raises:
            ValueError: for a text that its tokens do not give back.
        """
        ids, mask, finished = self._completion(segments, truncated)
        return Rollout(
            id=name,
            prompt_id="",
            group=0,
            prompt=prompt,
            completion=self._decode(ids),
            prompt_ids=tuple(prompt_ids),
            completion_ids=tuple(ids),
            finished=finished,
            completion_mask=None if all(mask) else tuple(mask),
            approximate=True,
        )

    def decoded(self, name: str, prompt: str, completion: str) -> Rollout:
        """Make a rollout of two texts that were decoded with their special tokens, to which nothing is added.

        Raises:
            ValueError: for a text that its tokens do not give back.
        """
        prompt_ids, ids = (
            tuple(self.encode(field_name, text, special=False, exact=True))
            for field_name, text in (("prompt", prompt), ("completion", completion))
        )
        return Rollout(
            id=name,
            prompt_id="",
            group=0,
            prompt=prompt,
            completion=self._decode(list(ids)),
            prompt_ids=prompt_ids,
            completion_ids=ids,
            finished=ids[-1:] == (self.tokenizer.eos_token_id,),
            approximate=True,
        )

    def _completion(self, segments: Sequence[Segment], truncated: bool | None) -> tuple[list[int], list[bool], bool]:
        """Return the ids, whether each was sampled, and whether they end the sequence."""
        ids: list[int] = []
        mask: list[bool] = []
        for text, sampled in segments:
            segment_ids = self.encode("completion", text, special=False, exact=sampled)
            ids += segment_ids
            mask += [sampled] * len(segment_ids)
        open_ended = segments[-1][1]
        eos: int = self.tokenizer.eos_token_id
        if open_ended and ids[-1:] == [eos]:
            del ids[-1], mask[-1]
        if truncated is None:
            truncated = self.max_completion_length is not None and len(ids) >= self.max_completion_length
        finished = open_ended and not truncated
        return ([*ids, eos], [*mask, True], True) if finished else (ids, mask, False)

    def _segments(self, prompt: list[Message] | None, completion: object) -> list[Segment]:
        if isinstance(completion, str):
            return [(completion, True)]
        messages = _messages("completion", completion)
        if len(messages) == 1 and set(messages[0]) == {"role", "content"} and isinstance(messages[0]["content"], str):
            return [(messages[0]["content"], messages[0]["role"] == "assistant")]
        if prompt is None:
            raise ValueError("the completion holds messages and the prompt a text; expected both of one kind")
        return self._turns(prompt, messages)

    def _turns(self, prompt: list[Message], completion: list[Message]) -> list[Segment]:
        """Return the template's text in segments: each assistant's turn (sampled) and the text between turns (not)."""
        turns = [place for place, message in enumerate(completion) if message["role"] == "assistant"]
        segments: list[Segment] = []
        text = self.render(prompt, True)
        for turn in turns:
            opened = self.render(prompt + completion[:turn], True)
            closed = self.render(prompt + completion[: turn + 1], False)
            answer = _rest(closed, opened)
            eos: str = self.tokenizer.eos_token
            end = answer.rfind(eos) + len(eos) if eos in answer else len(answer)
            segments += [(_rest(opened, text), False), (answer[:end], True)]
            text = opened + answer[:end]
        if not turns or turns[-1] < len(completion) - 1:
            segments.append((_rest(self.render(prompt + completion, False), text), False))
        return segments

    def render(self, messages: list[Message], generation: bool) -> str:
        """Return the chat template's text of messages, with or without the beginning of an answer."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **self.chat_template_kwargs
            )
        # A template is a program, which may raise anything at messages that it does not expect.
        except Exception as error:
            raise ValueError(
                f"the tokenizer's chat template fails on the messages ({error}); expected messages that it takes"
            ) from error
        return text

    def encode(self, name: str, text: str, special: bool, exact: bool = False) -> list[int]:
        """Return the tokens of a text.

        Args:
            name: of the field, for errors.
            text: the text.
            special: whether the tokenizer adds its special tokens.
            exact: whether the text was decoded from tokens, which these must then give back.

        Raises:
            ValueError: for a text that is no Unicode, or that its tokens do not give back.
        """
        require_unicode(name, text)
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        if exact:
            back = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if back != text:
                place = next(
                    (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back))
                )
                raise ValueError(
                    f"field {name!r} does not survive the tokenizer: {text[place : place + 20]!r} at character {place} "
                    f"becomes {back[place : place + 20]!r}; expected a text that it decoded. Pass the tokenizer of "
                    "this training, or a file with token ids"
                )
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _messages(name: str, value: object) -> list[Message]:
    """Return a list of messages without null fields; raise ``ValueError`` for anything else."""
    if not (isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value)):
        raise ValueError(f"field {name!r} is {reprlib.repr(value)}; expected a text or a list of messages with a role")
    for message in value:
        content = message.get("content")
        if isinstance(content, list) and any(item.get("type") != "text" for item in content):
            raise ValueError(
                f"field {name!r} holds something else than text, such as an image; expected text alone. Drop this "
                "record"
            )
    return [_without_nulls(message) for message in value]


def _without_nulls(value: Any) -> Any:
    # A parquet column gives every message the keys of all others, null where a message had none.
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _rest(text: str, start: str) -> str:
    """Return ``text`` after its beginning ``start``."""
    if not text.startswith(start):
        raise ValueError(
            "the tokenizer's chat template rewrites earlier turns; expected one that only appends, so that the "
            "sampled tokens can be separated from the rest. Use a file with token ids, or a template that only appends"
        )
    return text[len(start) :]
