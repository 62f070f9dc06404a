"""Prompts from files: the text or conversation that the policy answers, and the columns for the reward function."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fx_influence.interop.rollouts.files import refuse_substitution
from fx_influence.interop.rollouts.record import source_of

Message = dict[str, Any]
"""One turn of a conversation, ``{"role": "user", "content": "..."}``, with any further fields of a chat template."""

QUESTION_FIELDS = ("prompt", "messages", "question")
"""Fields of a record that can hold the prompt; the first one present does, and the others are columns."""


@dataclass(frozen=True)
class Prompt:
    """A text to complete or a conversation to answer, with its name and the further fields for the reward.

    Attributes:
        id: name, unique among the prompts that are read together.
        text: the text to complete as it stands; empty for a conversation.
        columns: the further fields of the record, by name, for the reward function.
        messages: the conversation, which the tokenizer's chat template turns into a text; None for a plain text.
    """

    id: str
    text: str
    columns: dict[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] | None = None

    @property
    def question(self) -> str | None:
        """Return the user's last message of a conversation, or its last message; None for a plain text."""
        if self.messages is None:
            return None
        questions = [message for message in self.messages if message["role"] == "user"] or self.messages
        return str(questions[-1]["content"])

    @property
    def source(self) -> str | None:
        """Return the data source or environment that a column names, see ``source_of``."""
        return source_of(self.columns)


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read the prompts of a ``.jsonl``, ``.parquet`` or ``.txt`` file, in order.

    A ``.txt`` file has one prompt per line, a ``.jsonl`` file one object per line, a ``.parquet`` file one record per
    row. A record holds one of

    - ``"prompt"``: a text, or a list of messages ``{"role": ..., "content": ...}`` up to where the policy answers;
    - ``"messages"``: such a list;
    - ``"question"`` with an ``"answer"`` that ends in ``#### 1,800``, as in GSM8K: the column ``answer`` is then
      ``"1800"`` and the column ``solution`` the complete answer.

    It may hold an ``"id"``; every other field is a column, such as ``"source"``. Blank lines are skipped; a prompt
    without an id is named by its index, from 0.

    Raises:
        FileNotFoundError: for a missing file.
        ImportError: for parquet without pyarrow.
        ValueError: for another suffix, a file without prompts, text that is not UTF-8, a malformed line or row (by
            number), a record without a prompt, messages that are empty or end with the assistant's, an id that occurs
            twice, or a pointer of git-lfs or a page of HTML in place of the file.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "p.jsonl"
        ...     _ = file.write_text('{"prompt": "1+1=", "answer": "2"}\\n')
        ...     read_prompts(file)
        [Prompt(id='0', text='1+1=', columns={'answer': '2'}, messages=None)]

    Source: the fields of https://huggingface.co/datasets/openai/gsm8k; TRL's conversational format.
    """
    file = Path(path)
    if not file.is_file():
        state = "is a directory" if file.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"prompts file {str(path)!r} {state}; expected a file of prompts. Check the path, or give the prompts "
            "themselves in a list"
        )
    refuse_substitution(file)
    if file.suffix == ".jsonl":
        records = [(source, _object(source, line)) for source, line in _lines(file)]
    elif file.suffix in (".parquet", ".txt"):
        records = _rows(file) if file.suffix == ".parquet" else _lines(file)
    else:
        raise ValueError(
            f"prompts file {str(path)!r} ends in {file.suffix!r}; expected a .jsonl, .parquet or .txt file"
        )
    prompts = _prompts(records)
    if not prompts:
        raise ValueError(f"prompts file {str(path)!r} holds no prompt; expected at least one")
    return prompts


def make_prompts(records: Sequence[str | dict[str, Any]]) -> list[Prompt]:
    """Make prompts from values such as a ``.txt`` or ``.jsonl`` file holds: a text or a record each.

    Raises:
        ValueError: as ``read_prompts`` does, naming a prompt by its index, from 0.

    Example:
        >>> [prompt.id for prompt in make_prompts(["1+1=", {"prompt": "1+2=", "id": "three", "answer": "3"}])]
        ['0', 'three']
    """
    return _prompts([(f"prompt {i}", record) for i, record in enumerate(records)])


def as_conversations(prompts: Sequence[Prompt], chat: bool, system: str | None) -> list[Prompt]:
    """Return the prompts in the form that a chat model expects.

    Without ``chat`` and ``system`` they stay unchanged.

    Args:
        prompts: n plain texts or conversations.
        chat: True turns a plain text into one message of the user.
        system: the text of a system message to put first; None adds none.

    Returns:
        n prompts in the same order.

    Raises:
        ValueError: naming the prompt, if ``system`` meets a plain text or a conversation that has a system message, or
            if some prompts are plain texts and others conversations.

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
                f"prompt {prompt.id!r} and prompt {prompts[0].id!r} are a text and a conversation; expected "
                "prompts of one kind, since no reward function takes both. Set chat: true, or use two files"
            )
    return list(prompts)


def text_for(tokenizer: Any, prompt: Prompt) -> str:
    """Return the text that the policy continues: a conversation up to where the chat template opens the answer.

    A conversation's text already contains its special tokens.

    Raises:
        ValueError: naming the prompt, if the tokenizer has no chat template or the template fails.

    Example:
        >>> text_for(None, Prompt("a", "1+1="))
        '1+1='
    """
    if prompt.messages is None:
        return prompt.text
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"prompt {prompt.id!r} is a conversation and the tokenizer has no chat template; expected one. Save "
            "the tokenizer with it (chat_template.jinja beside it), or give plain texts and chat: false"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in prompt.messages], tokenize=False, add_generation_prompt=True
        )
    # A template may raise anything, such as jinja2's own errors.
    except Exception as error:
        raise ValueError(
            f"prompt {prompt.id!r}: the tokenizer's chat template fails on roles "
            f"{[message['role'] for message in prompt.messages]} ({error}); expected messages that it takes"
        ) from error
    return text


def _lines(file: Path) -> list[tuple[str, Any]]:
    try:
        # Not splitlines(): it would also split at characters that are legal inside a JSON string.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompts file {str(file)!r} is not UTF-8 ({error}); expected UTF-8. Convert it first"
        ) from error
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
        raise ValueError(
            f"prompts file {str(file)!r} cannot be read as parquet ({error}); expected a parquet file. Write it again"
        ) from error
    return [(f"{file}, row {number}", row) for number, row in enumerate(rows)]


def _prompts(records: Sequence[tuple[str, Any]]) -> list[Prompt]:
    prompts: list[Prompt] = []
    source_of: dict[str, str] = {}
    for source, record in records:
        prompt = _prompt(source, {"prompt": record} if isinstance(record, str) else dict(record), str(len(prompts)))
        if prompt.id in source_of:
            raise ValueError(
                f"{source}: id {prompt.id!r} is already the id of {source_of[prompt.id]}; expected unique ids"
            )
        source_of[prompt.id] = source
        prompts.append(prompt)
    return prompts


def _object(source: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON ({error.msg}); expected one object on each line") from error
    if type(record) is not dict:
        raise ValueError(
            f'{source} holds {type(record).__name__}; expected an object on each line, such as {{"prompt": "..."}}'
        )
    return record


def _prompt(source: str, record: dict[str, Any], default_id: str) -> Prompt:
    name = record.pop("id", default_id)
    if type(name) not in (str, int):
        raise ValueError(f'{source}: "id" is {name!r}; expected a text or a whole number')
    # In a parquet file every row has every column, None where the record had no such field.
    key = next((key for key in QUESTION_FIELDS if record.get(key) is not None), None)
    if key is None:
        raise ValueError(
            f'{source} has no "prompt", "messages" or "question" (it has {sorted(record)}); expected one of them. '
            "Add it"
        )
    value = record.pop(key)
    if isinstance(value, list) and key != "question":
        return Prompt(str(name), "", record, _messages(source, key, value))
    if not isinstance(value, str) or not value or key == "messages":
        kinds = {"prompt": "a non-empty text or a list of messages", "messages": "a list of messages"}
        raise ValueError(f'{source}: "{key}" is {value!r}; expected {kinds.get(key, "a non-empty text")}')
    return Prompt(str(name), value, _split_gsm8k_answer(source, record) if key == "question" else record)


def _split_gsm8k_answer(source: str, columns: dict[str, Any]) -> dict[str, Any]:
    """Move GSM8K's gold answer, which follows the worked solution, into a column of its own."""
    worked = columns.get("answer")
    gold = worked.rpartition("####")[2].strip() if isinstance(worked, str) and "####" in worked else ""
    if not gold:
        raise ValueError(
            f'{source}: "answer" is {worked!r}; expected an end such as "#### 72", as the answers of GSM8K have. '
            'Write "prompt" for "question" to use the answer as it is'
        )
    return {"solution": worked, **columns, "answer": re.sub(r"(?<=\d),(?=\d{3})", "", gold)}


def _messages(source: str, key: str, values: list[Any]) -> tuple[Message, ...]:
    for i, value in enumerate(values):
        if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f'{source}: message {i} of "{key}" is {value!r}; expected {{"role": "user", "content": "..."}}, '
                "both texts"
            )
    if not values or values[-1]["role"] == "assistant":
        raise ValueError(
            f'{source}: "{key}" {"ends with the assistant" if values else "is empty"}; expected a last message '
            "that the policy is to answer"
        )
    # In a parquet file every message has the fields of all messages, None where it had none; templates test presence.
    return tuple({key: item for key, item in value.items() if item is not None} for value in values)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _with_system(prompt: Prompt, system: str) -> Prompt:
    if prompt.messages is None:
        raise ValueError(
            f"system is {system!r} and prompt {prompt.id!r} a plain text; expected a conversation. Set chat: true"
        )
    if prompt.messages[0]["role"] == "system":
        raise ValueError(
            f"system is {system!r} and prompt {prompt.id!r} begins with a system message of its own; expected one "
            "system message. Remove the other"
        )
    return replace(prompt, messages=(_message("system", system), *prompt.messages))
