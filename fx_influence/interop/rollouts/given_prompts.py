"""Prompts that were trained on, matched to recorded texts that have lost the markers of the chat template."""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fx_influence.interop.rollouts.record import Rollout, source_of
from fx_influence.interop.rollouts.retokenize import Message, Retokenizer, Segment

_CONTENT = "Qq7Zz"
"""A text that no template contains, in place of a message's content."""


@dataclass(frozen=True)
class _Between:
    """Text of the template around a message between two answers: as rendered, and without special tokens."""

    before: str
    after: str
    bare_before: str
    bare_after: str


@dataclass(frozen=True)
class GivenPrompts:
    """Original prompts, by the text that remains of each without special tokens.

    Attributes:
        prompts: texts, or lists of messages, each as it was given to the chat template; or rows of the data set that
            have one of these as ``prompt``, whose source is kept.
        retokenizer: of the texts.

    Raises:
        ValueError: for a prompt that is neither.
    """

    prompts: Sequence[Any]
    retokenizer: Retokenizer

    def rollout(self, name: str, recorded: str, completion: str, truncated: bool | None) -> Rollout:
        """Make a rollout of a recorded prompt and completion, both decoded without special tokens.

        Args:
            name: id of the rollout.
            recorded: the prompt's text.
            completion: the completion's text.
            truncated: whether the completion was cut off; None if nobody says so.

        Raises:
            ValueError: for a prompt that is none of the given ones, or more than one.
        """
        matches = self._by_text.get(recorded.strip(), {})
        if len(matches) != 1:
            raise ValueError(
                f"field 'input' is {reprlib.repr(recorded)}, of {len(matches)} of the {len(self.prompts)} prompts; "
                "expected one of them, as the chat template writes it. Pass all prompts of the training as prompts=, "
                "and the template's other arguments as chat_template_kwargs="
            )
        (ids, (text, source)), *_ = matches.items()
        segments = list(self._segments(completion))
        rollout = self.retokenizer.continued(name, text, ids, segments, truncated)
        return dataclasses.replace(rollout, source=source)

    @cached_property
    def _by_text(self) -> dict[str, dict[tuple[int, ...], tuple[str, str | None]]]:
        """Tokens, text and source of the prompts by what remains without special tokens."""
        table: dict[str, dict[tuple[int, ...], tuple[str, str | None]]] = {}
        for row in self.prompts:
            is_row = isinstance(row, Mapping)
            prompt, source = (row.get("prompt"), source_of(row)) if is_row else (row, None)
            if not isinstance(prompt, (str, Sequence)) and not hasattr(prompt, "tolist"):
                raise ValueError(
                    f"prompts holds {reprlib.repr(row)}; expected texts, lists of messages, or rows with one as "
                    "'prompt'. Pass the prompts of the training's data set"
                )
            chat = not isinstance(prompt, str)
            text = self.retokenizer.render(list(prompt), True) if chat else prompt
            ids = tuple(self.retokenizer.encode("prompt", text, special=not chat))
            table.setdefault(self._bare(ids).strip(), {})[ids] = text, source
        return table

    def _bare(self, ids: Sequence[int]) -> str:
        text: str = self.retokenizer.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    @cached_property
    def _between(self) -> list[_Between]:
        """Texts of the template around a message of a tool or user; none where the template cannot render it."""
        texts = []
        for role in ("tool", "user"):
            turn: list[Message] = [{"role": "user", "content": _CONTENT}, {"role": "assistant", "content": _CONTENT}]
            try:
                text = self.retokenizer.render([*turn, {"role": role, "content": _CONTENT}], True)
            except ValueError:
                continue
            parts = text.split(_CONTENT)
            if len(parts) != 4:
                continue
            eos = self.retokenizer.tokenizer.eos_token
            # The end of the answer is sampled; what follows it is the template's.
            before = parts[2][len(eos) :] if parts[2].startswith(eos) else parts[2]
            bare = [self._bare(self.retokenizer.encode("prompt", part, special=False)) for part in (before, parts[3])]
            if bare[0].strip() and bare[1].strip():
                texts.append(_Between(before, parts[3], *bare))
        return texts

    def _segments(self, completion: str) -> Iterator[Segment]:
        """Yield the answers of a completion, and what the template and others wrote between them."""
        pattern = "|".join(f"{re.escape(b.bare_before)}(.*?){re.escape(b.bare_after)}" for b in self._between)
        start = 0
        for match in re.finditer(pattern, completion, re.DOTALL) if pattern else ():
            index = next(i for i, content in enumerate(match.groups()) if content is not None)
            between = self._between[index]
            yield completion[start : match.start()] + self.retokenizer.tokenizer.eos_token, True
            yield between.before + match[index + 1] + between.after, False
            start = match.end()
        yield completion[start:], True
