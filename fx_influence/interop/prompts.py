"""Prompts from files: what to ask the policy, and the columns that the reward function needs beside it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Message = dict[str, Any]
"""One turn of a conversation, ``{"role": "user", "content": "..."}``, and what else a chat template reads."""

ASKED = ("prompt", "messages", "question")
"""Fields of a record that can hold what is asked; the first that is there does, and the others are columns."""


@dataclass(frozen=True)
class Prompt:
    """A text to complete or a conversation to answer, its name, and the further fields (``columns``) for the reward.

    ``text``: completed as it stands; empty for a conversation. ``messages``: the conversation, which the tokenizer's
    chat template makes a text of; None for a plain text.
    """

    id: str
    text: str
    columns: dict[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] | None = None

    @property
    def question(self) -> str | None:
        """Return the last message of a conversation that the user wrote, or else its last; None for a plain text."""
        if self.messages is None:
            return None
        asked = [message for message in self.messages if message["role"] == "user"] or self.messages
        return str(asked[-1]["content"])


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Prompts of a ``.jsonl``, ``.parquet`` or ``.txt`` file, in order.

    ``.txt``: a prompt a line. ``.jsonl``: an object a line; ``.parquet``: a row each. Such a record holds one of
    ``"prompt"``, a text or a list of messages ``{"role": ..., "content": ...}`` up to where the policy answers;
    ``"messages"``, such a list; or GSM8K's ``"question"`` with an ``"answer"`` that ends in ``#### 1,800``: the column
    ``answer`` is then ``"1800"`` and the column ``solution`` the whole. It may hold an ``"id"``; every other field is a
    column. Blank lines are skipped; a prompt without id is named by its index, from 0.

    Raises ``FileNotFoundError`` for a missing file, ``ImportError`` for parquet without pyarrow, and ``ValueError`` for
    another suffix, a file without prompts, text that is not UTF-8, a malformed line or row (by number), a record
    without anything to ask, messages that are none or end with the assistant's, or an id that occurs twice.
    Source: the fields of https://huggingface.co/datasets/openai/gsm8k; TRL's conversational format.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "p.jsonl"
        ...     _ = file.write_text('{"prompt": "1+1=", "answer": "2"}\\n')
        ...     read_prompts(file)
        [Prompt(id='0', text='1+1=', columns={'answer': '2'}, messages=None)]
    """
    file = Path(path)
    if not file.is_file():
        state = "is a directory" if file.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"prompts file {str(path)!r} {state}; check the path, or give what is asked itself in a list"
        )
    if file.suffix == ".jsonl":
        records = [(where, _object(where, line)) for where, line in _lines(file)]
    elif file.suffix in (".parquet", ".txt"):
        records = _rows(file) if file.suffix == ".parquet" else _lines(file)
    else:
        raise ValueError(f"prompts file {str(path)!r} ends in {file.suffix!r}; give a .jsonl, .parquet or .txt file")
    prompts = _prompts(records)
    if not prompts:
        raise ValueError(f"prompts file {str(path)!r} holds no prompt; put at least one in")
    return prompts


def make_prompts(records: Sequence[str | dict[str, Any]]) -> list[Prompt]:
    """Prompts from values as a ``.txt`` or ``.jsonl`` file holds them, a text or an object each.

    Raises ``ValueError`` as ``read_prompts`` does, naming a prompt by its place, from 0.

    Example:
        >>> [prompt.id for prompt in make_prompts(["1+1=", {"prompt": "1+2=", "id": "three", "answer": "3"}])]
        ['0', 'three']
    """
    return _prompts([(f"prompt {i}", record) for i, record in enumerate(records)])


def as_conversations(prompts: Sequence[Prompt], chat: bool, system: str | None) -> list[Prompt]:
    """The prompts as a chat model is asked: ``chat`` makes a plain text a user's message, ``system`` goes before all.

    Without either they stay as they are. Raises ``ValueError``, naming the prompt, where ``system`` meets a plain text
    or a conversation that has a system message, and where some are plain texts and others conversations.

    Example:
        >>> as_conversations([Prompt("a", "1+1?")], chat=True, system="Be brief.")[0].messages
        ({'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': '1+1?'})
    """
    if chat:
        prompts = [p if p.messages else replace(p, text="", messages=(_message("user", p.text),)) for p in prompts]
    if system is not None:
        prompts = [_with_system(prompt, system) for prompt in prompts]
    for prompt in prompts:
        if (prompt.messages is None) != (prompts[0].messages is None):
            raise ValueError(
                f"prompt {prompt.id!r} and prompt {prompts[0].id!r} are a text and a conversation, which no reward "
                "function takes together; set chat: true, or keep them apart"
            )
    return list(prompts)


def text_for(tokenizer: Any, prompt: Prompt) -> str:
    """The text that the policy goes on from: a conversation as the tokenizer's chat template opens the answer to it.

    Such a text has its special tokens in it already. Raises ``ValueError``, naming the prompt, where the tokenizer has
    no chat template or its template fails.

    Example:
        >>> text_for(None, Prompt("a", "1+1="))
        '1+1='
    """
    if prompt.messages is None:
        return prompt.text
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"prompt {prompt.id!r} is a conversation, but the tokenizer has no chat template; save the tokenizer with "
            "one (chat_template.jinja beside it), or give plain texts and chat: false"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in prompt.messages], tokenize=False, add_generation_prompt=True
        )
    # A template raises what it likes, such as jinja2's own errors.
    except Exception as error:
        raise ValueError(
            f"prompt {prompt.id!r}: the tokenizer's chat template fails on roles "
            f"{[message['role'] for message in prompt.messages]} ({error}); give messages that it takes"
        ) from error
    return text


def _lines(file: Path) -> list[tuple[str, Any]]:
    try:
        # Not splitlines(): it would also split at characters that are legal inside a JSON string.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts file {str(file)!r} is not UTF-8 ({error}); convert it first") from error
    return [(f"{file}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def _rows(file: Path) -> list[tuple[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("reading parquet needs pyarrow: pip install 'fx-influence[parquet]'") from error
    try:
        with parquet.ParquetFile(file) as table:
            rows = table.read().to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"prompts file {str(file)!r} cannot be read as parquet ({error}); write it again") from error
    return [(f"{file}, row {number}", row) for number, row in enumerate(rows)]


def _prompts(records: Sequence[tuple[str, Any]]) -> list[Prompt]:
    prompts: list[Prompt] = []
    first: dict[str, str] = {}
    for where, record in records:
        prompt = _prompt(where, {"prompt": record} if isinstance(record, str) else dict(record), str(len(prompts)))
        if prompt.id in first:
            raise ValueError(f"{where}: id {prompt.id!r} is already the id of {first[prompt.id]}; ids must be unique")
        first[prompt.id] = where
        prompts.append(prompt)
    return prompts


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg}); each line must hold one object") from error
    if type(record) is not dict:
        raise ValueError(
            f'{where} holds {type(record).__name__}; each line must hold an object such as {{"prompt": "..."}}'
        )
    return record


def _prompt(where: str, record: dict[str, Any], default_id: str) -> Prompt:
    name = record.pop("id", default_id)
    if type(name) not in (str, int):
        raise ValueError(f'{where}: "id" is {name!r}; give a text or a whole number')
    # In a parquet file every row has every field, with None for nothing.
    asked = next((key for key in ASKED if record.get(key) is not None), None)
    if asked is None:
        raise ValueError(f'{where} has no "prompt", "messages" or "question" (it has {sorted(record)}); add one')
    value = record.pop(asked)
    if isinstance(value, list) and asked != "question":
        return Prompt(str(name), "", record, _messages(where, asked, value))
    if not isinstance(value, str) or not value or asked == "messages":
        kinds = {"prompt": "a non-empty text or a list of messages", "messages": "a list of messages"}
        raise ValueError(f'{where}: "{asked}" is {value!r}; give {kinds.get(asked, "a non-empty text")}')
    return Prompt(str(name), value, _gold_apart(where, record) if asked == "question" else record)


def _gold_apart(where: str, columns: dict[str, Any]) -> dict[str, Any]:
    """GSM8K's gold answer, which it writes after the worked solution, as a column of its own."""
    worked = columns.get("answer")
    gold = worked.rpartition("####")[2].strip() if isinstance(worked, str) and "####" in worked else ""
    if not gold:
        raise ValueError(
            f'{where}: "answer" is {worked!r}, which does not end in "#### 72" as that of a GSM8K "question" does; '
            'write "prompt" for "question" where the answer is to be taken as it is'
        )
    return {"solution": worked, **columns, "answer": re.sub(r"(?<=\d),(?=\d{3})", "", gold)}


def _messages(where: str, asked: str, values: list[Any]) -> tuple[Message, ...]:
    for i, value in enumerate(values):
        if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f'{where}: message {i} of "{asked}" is {value!r}; give {{"role": "user", "content": "..."}}, both texts'
            )
    if not values or values[-1]["role"] == "assistant":
        raise ValueError(
            f'{where}: "{asked}" {"ends with the assistant" if values else "is empty"}; end it with the message that '
            "the policy is to answer"
        )
    # In a parquet file every message has the fields of all, with None for nothing; templates ask whether one is there.
    return tuple({key: item for key, item in value.items() if item is not None} for value in values)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _with_system(prompt: Prompt, system: str) -> Prompt:
    if prompt.messages is None:
        raise ValueError(f"system is {system!r}, but prompt {prompt.id!r} is a plain text; set chat: true")
    if prompt.messages[0]["role"] == "system":
        raise ValueError(
            f"system is {system!r}, but prompt {prompt.id!r} begins with a system message of its own; remove one"
        )
    return replace(prompt, messages=(_message("system", system), *prompt.messages))
