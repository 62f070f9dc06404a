"""Rollouts of trainers that write a table as one line, a list for each column: ms-swift and ROLL."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fx_influence.interop.rollouts.advantages import with_group_advantages
from fx_influence.interop.rollouts.formats.text_formats import reward_columns
from fx_influence.interop.rollouts.formats.token_formats import NUMBER
from fx_influence.interop.rollouts.jsonl import NotFinite, field, parse_all, read_json_lines
from fx_influence.interop.rollouts.record import Rollout, number_prompts, source_of
from fx_influence.interop.rollouts.retokenize import Retokenizer

SWIFT = ("step", "prompt", "completion", "advantages", "entropy", "num_turns", "solution", "image")
"""Columns of ms-swift that are no rewards."""


def read_swift(
    files: Sequence[Path], retokenizer: Retokenizer, reward_weights: Mapping[str, float] | None = None
) -> list[Rollout]:
    """Read rollouts of ms-swift's ``completions.jsonl`` (``log_completions``): retokenised.

    A line is a table with the columns ``step``, ``prompt`` (the chat template's text), ``completion``, ``advantages``
    and one for each reward function. Equal prompts of a step are one. Rewards are as of ``read_trl``.

    Source: modelscope/ms-swift, swift/rlhf_trainers/grpo_trainer.py at commit 3602360 (``log``, ``_log_rollout``).
    """
    rows = _rows(files, ("step", "prompt", "completion", "advantages"))
    numeric = _numeric(row for _, row in rows)
    weights = reward_columns(numeric, reward_weights)

    def parse(index: int, row: dict[str, Any]) -> tuple[Rollout, tuple[Any, ...]]:
        prompt, completion = (field(row, name, (str,), "a string") for name in ("prompt", "completion"))
        ids = retokenizer.encode("prompt", prompt, special=False)
        rollout = retokenizer.continued(str(index), prompt, ids, [(completion, True)], None)
        # NaN, like null, stands for a reward function that returned None.
        rewards = [
            weight * row[name]
            for name, weight in weights.items()
            if isinstance(row[name], NUMBER) and not _is_nan(row[name])
        ]
        advantage = float(field(row, "advantages", NUMBER, "a number"))
        reward = float(sum(rewards)) if rewards else None
        rollout = dataclasses.replace(rollout, reward=reward, advantage=advantage, source=source_of(row))
        return rollout, (field(row, "step", (str, int), "a step"), rollout.prompt_ids)

    return number_prompts(parse_all(rows, parse))


def read_roll(files: Sequence[Path], retokenizer: Retokenizer, scale: bool = True) -> list[Rollout]:
    """Read rollouts of ROLL's ``rollout_dump_data.step_<n>.jsonl`` (``rollout_dump_dir`` of RLVR): retokenised.

    A line is a table with the columns ``responses``, decoded without special tokens, ``scores``, ``prompt`` (a text) or
    ``messages`` (a list of them, as JSON), and, in most, ``id``, ``global_step`` and ``source``. Rows of one ``id`` are
    one prompt. Advantages are ``losses.group_advantages`` of the scores.

    Source: alibaba/ROLL, roll/pipeline/rlvr/utils.py at commit 8eb27cc (``dump_rollout_to_specific_path``).
    """
    rows = _rows(files, ("responses", "scores"))

    def parse(index: int, row: dict[str, Any]) -> tuple[Rollout, tuple[Any, ...]]:
        completion = field(row, "responses", (str,), "a string")
        messages = row.get("messages")
        if isinstance(messages, str):
            try:
                messages = json.loads(messages)
            except json.JSONDecodeError as error:
                raise ValueError(f"column 'messages' is not JSON ({error.msg}); expected a list of messages") from error
        prompt = messages if messages else field(row, "prompt", (str,), "a string")
        rollout = retokenizer.rollout(str(index), prompt, completion, None)
        reward = float(field(row, "scores", NUMBER, "a number"))
        key = row.get("id") or rollout.prompt_ids
        return dataclasses.replace(rollout, reward=reward, source=source_of(row)), (row.get("global_step"), key)

    return with_group_advantages(number_prompts(parse_all(rows, parse)), scale)


def _rows(files: Sequence[Path], columns: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of all tables, each with its place."""

    def parse(index: int, table: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        lengths = {name: len(field(table, name, (list,), "a list, one value a row")) for name in columns}
        count = lengths[columns[0]]
        if set(lengths.values()) != {count}:
            raise ValueError(f"the columns have the lengths {lengths}; expected one length")
        lists = {name: values for name, values in table.items() if isinstance(values, list) and len(values) == count}
        place = f"table {index} of {files[0].parent if len(files) > 1 else files[0]}"
        return [(f"{place}, row {row}", {name: lists[name][row] for name in lists}) for row in range(count)]

    return [row for rows in read_json_lines(files, parse) for row in rows]


def _numeric(rows: Iterator[dict[str, Any]]) -> list[str]:
    """Return the columns that may be rewards: of numbers or null in every row."""
    names: dict[str, bool] = {}
    for row in rows:
        for name, value in row.items():
            valid = value is None or isinstance(value, NotFinite) or type(value) in NUMBER
            names[name] = names.get(name, True) and valid
    return [name for name, valid in names.items() if valid and name not in SWIFT]


def _is_nan(value: float) -> bool:
    if isinstance(value, NotFinite) and value.text != "NaN":
        raise ValueError(f"a reward is {value.text}; expected finite numbers. Repair it first")
    return value != value
