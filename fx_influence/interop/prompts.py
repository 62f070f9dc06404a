"""Prompts from files: what to ask the policy, and the columns that the reward function needs beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A text to complete, its name, and the further fields (``columns``) handed to the reward function."""

    id: str
    text: str
    columns: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Prompts of a ``.jsonl`` or ``.txt`` file, in order.

    ``.jsonl``: an object a line with ``"prompt"`` (text), optionally ``"id"``; every other field is a column.
    ``.txt``: a prompt a line. Blank lines are skipped; a prompt without id is named by its index, from 0.

    Raises ``FileNotFoundError`` for a missing file, and ``ValueError`` for another suffix, a file without prompts, text
    that is not UTF-8, a malformed line (by number), a missing or empty ``"prompt"``, or an id that occurs twice.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "p.jsonl"
        ...     _ = file.write_text('{"prompt": "1+1=", "answer": "2"}\\n')
        ...     read_prompts(file)
        [Prompt(id='0', text='1+1=', columns={'answer': '2'})]
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"prompts file {str(path)!r} does not exist; check the path")
    if file.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"prompts file {str(path)!r} ends in {file.suffix!r}; give a .jsonl or a .txt file")
    try:
        # Not splitlines(): it would also split at characters that are legal inside a JSON string.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts file {str(path)!r} is not UTF-8 ({error}); convert it first") from error
    numbered = [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    parse = _object if file.suffix == ".jsonl" else lambda where, line: line
    prompts = _prompts([(where, parse(where, line)) for where, line in numbered])
    if not prompts:
        raise ValueError(f"prompts file {str(path)!r} holds no prompt; write one a line")
    return prompts


def make_prompts(records: Sequence[str | dict[str, Any]]) -> list[Prompt]:
    """Prompts from values as a ``.txt`` or ``.jsonl`` file holds them, a text or an object each.

    Raises ``ValueError`` as ``read_prompts`` does, naming a prompt by its place, from 0.

    Example:
        >>> [prompt.id for prompt in make_prompts(["1+1=", {"prompt": "1+2=", "id": "three", "answer": "3"}])]
        ['0', 'three']
    """
    return _prompts([(f"prompt {i}", record) for i, record in enumerate(records)])


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
    if "prompt" not in record:
        raise ValueError(f'{where} has no field "prompt" (it has {sorted(record)}); add the text to complete')
    text, name = record.pop("prompt"), record.pop("id", default_id)
    if not isinstance(text, str) or not text:
        raise ValueError(
            f'{where}: "prompt" is {text!r}; give a non-empty text (for a conversation, the chat template applied)'
        )
    if type(name) not in (str, int):
        raise ValueError(f'{where}: "id" is {name!r}; give a text or a whole number')
    return Prompt(str(name), text, record)
