"""Rollout files of trainers that record texts, which have to be tokenised again: verl and TRL."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fx_influence.interop.rollouts.advantages import with_group_advantages
from fx_influence.interop.rollouts.files import refuse_substitution
from fx_influence.interop.rollouts.given_prompts import GivenPrompts
from fx_influence.interop.rollouts.jsonl import field, parse_all, read_json_lines
from fx_influence.interop.rollouts.record import Rollout, extras_of, number_prompts, source_of
from fx_influence.interop.rollouts.retokenize import Retokenizer

NUMBER = (int, float)
TRL_COLUMNS = ("step", "prompt", "completion", "advantage")
VERL = ("input", "output", "gts", "score", "step", "uid", "truncated")
"""Fields of verl's records that are no extra information."""

VERL_UID = re.compile(r"((.+)_\d+)_\d+", re.DOTALL)
"""Matches a ``uid`` ``<prompt>_<session>_<output>``; group 1 is the session, group 2 the prompt."""


def read_verl(
    files: Sequence[Path], retokenizer: Retokenizer, scale: bool = True, prompts: GivenPrompts | None = None
) -> list[Rollout]:
    """Read rollouts of verl's ``trainer.rollout_data_dir``, ``<step>.jsonl``: retokenised, with group advantages.

    A record has the texts ``input`` and ``output``, the reward ``score`` and ``step``. The trainers of
    verl/trainer/ppo/v1 add ``uid``, ``<prompt>_<session>_<output>``, which tells the groups; without it, equal inputs
    of a step are one group. If a session has several outputs, its last one is compared in the group and all share its
    advantage, as in verl. verl decodes with ``skip_special_tokens=True`` and without its masks: the markers of a chat
    template are missing from both texts, so the prompt is not quite what the policy saw, and what a tool wrote inside
    ``output`` cannot be told from what was sampled. With ``prompts``, those that were trained on, the tokens of prompts
    are exactly those that verl made, and turns of tools or users inside ``output`` are told by the template's text
    between turns and masked. Where the reward function returns ``data_source`` among its extra information, verl writes
    it to the record, and it is the rollout's ``source``; all extra information that is a number, a text or a boolean is
    in ``extras``.

    Args:
        files: the files of a step.
        retokenizer: of the texts.
        scale: whether advantages are scaled, see ``losses.group_advantages``.
        prompts: that were trained on, or None.

    Raises:
        ValueError: by line, also for an input that is none of ``prompts``.

    Source: verl-project/verl, verl/trainer/ppo/v1/trainer_base.py at commit 39574b5 (``_log_rollout_data``,
    ``_write_generations``), v1/utils.py at 1117b4a (``compute_advantage_for_multi_trajectories``) and
    verl/trainer/ppo/ray_trainer.py at d163ff3 (``_dump_generations``, without ``uid``).
    """

    def parse(index: int, record: dict[str, Any]) -> tuple[Rollout, tuple[Any, ...]]:
        prompt, completion = (field(record, name, (str,), "a string") for name in ("input", "output"))
        step = field(record, "step", (int,), "an integer")
        uid = field({"uid": "", **record}, "uid", (str,), "a string")
        uid_match = VERL_UID.fullmatch(uid)
        name = uid if uid_match else str(index)
        if prompts is None:
            rollout = retokenizer.rollout(name, prompt, completion, _truncated(record))
        else:
            rollout = prompts.rollout(name, prompt, completion, _truncated(record))
        reward = float(field(record, "score", NUMBER, "a number"))
        rollout = dataclasses.replace(
            rollout, reward=reward, source=source_of(record) or rollout.source, extras=extras_of(record, VERL)
        )
        return rollout, (
            step,
            uid_match[2] if uid_match else uid or rollout.prompt_ids,
        )

    rollouts = number_prompts(read_json_lines(files, parse))
    # verl sorts by prompt, session and output, so the last row of a session is its last output.
    sessions = [uid_match[1] if (uid_match := VERL_UID.fullmatch(r.id)) else r.id for r in rollouts]
    return with_group_advantages(rollouts, scale, sessions)


def read_trl(
    files: Sequence[Path], retokenizer: Retokenizer, reward_weights: Mapping[str, float] | None = None
) -> list[Rollout]:
    """Read rollouts of TRL's ``completions/completions_<step>.parquet`` (``log_completions=True``): retokenised.

    The columns are ``step``, ``prompt`` and ``completion`` (texts, or lists of messages), one for each reward
    function, those of ``log_extra``, and ``advantage``, which is taken as it is. Equal prompts of a step are one group.
    The reward is the one column of numbers beside these, or the sum over ``reward_weights``, of each row's columns that
    are neither null nor NaN (a function that returned ``None``); with several columns and no ``reward_weights`` it is
    None. A text in ``source`` or ``data_source``, as ``log_extra`` may write it, is the rollout's ``source``.

    Args:
        files: the files, of one set of columns.
        retokenizer: of the texts.
        reward_weights: weights by column name; None takes the only column of numbers.

    Raises:
        ImportError: without pyarrow.
        ValueError: for other columns, and by row (from 0) for a bad one.

    Source: trl 1.16.0, trl/trainer/grpo_trainer.py, ``GRPOTrainer.log``.
    """
    tables = [_parquet(path) for path in files]
    numeric = tables[0][1]
    for path, (_, columns) in zip(files, tables, strict=True):
        if columns != numeric:
            raise ValueError(
                f"rollouts file {str(path)!r} has the columns of numbers {columns}; expected {numeric}, as in "
                f"{str(files[0])!r}. Pass one of them"
            )
    weights = reward_columns(numeric, reward_weights)
    rows = [
        (f"{path}, row {i}", row) for path, (table, _) in zip(files, tables, strict=True) for i, row in enumerate(table)
    ]

    def parse(index: int, row: dict[str, Any]) -> tuple[Rollout, tuple[Any, ...]]:
        # NaN, like null, stands for a reward function that returned None.
        values = {name: row[name] for name in weights if row[name] is not None and not math.isnan(row[name])}
        for name, value in {"advantage": row["advantage"], **values}.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"column {name!r} holds {value}; expected finite numbers. Repair it first")
        step = field(row, "step", (int,), "an integer")
        advantage = float(field(row, "advantage", NUMBER, "a number; pandas writes NaN as null"))
        rollout = retokenizer.rollout(str(index), row["prompt"], row["completion"], _truncated(row))
        rewards = [weights[name] * value for name, value in values.items()]
        reward = float(sum(rewards)) if rewards else None
        rollout = dataclasses.replace(rollout, reward=reward, advantage=advantage, source=source_of(row))
        return rollout, (step, rollout.prompt_ids)

    return number_prompts(parse_all(rows, parse))


def _truncated(record: dict[str, Any]) -> bool | None:
    """Return the field ``truncated`` of a record, None if it is missing or null."""
    if record.get("truncated") is None:
        return None
    truncated: bool = field(record, "truncated", (bool,), "a boolean")
    return truncated


def _parquet(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows, and the names of the columns of numbers that may be rewards."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("reading parquet needs pyarrow: pip install 'fx-influence[parquet]'") from error
    refuse_substitution(path)
    try:
        # Not read_table, which also makes columns from the names of directories.
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"rollouts file {str(path)!r} is not parquet ({error}); expected TRL's own file") from error
    missing = [name for name in TRL_COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(
            f"rollouts file {str(path)!r} has the columns {table.column_names}; expected those of TRL's "
            f"completions, {list(TRL_COLUMNS)} (missing: {missing})"
        )
    kinds = pyarrow.types
    numeric = [f.name for f in table.schema if kinds.is_floating(f.type) or kinds.is_integer(f.type)]
    return table.to_pylist(), [name for name in numeric if name not in TRL_COLUMNS]


def reward_columns(numeric: list[str], weights: Mapping[str, float] | None) -> Mapping[str, float]:
    """Return the weight of each column that adds up to the reward."""
    if weights is None:
        return {numeric[0]: 1.0} if len(numeric) == 1 else {}
    unknown = [name for name in weights if name not in numeric]
    if unknown:
        raise ValueError(f"reward_weights has {unknown}; expected the file's columns of numbers, {numeric}")
    return weights
