"""Rollout files of trainers that record texts, which have to be made tokens again: verl and TRL."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fx_influence.interop.rollouts.jsonl import field, read_all, read_json_lines
from fx_influence.interop.rollouts.record import Rollout, number_prompts
from fx_influence.interop.rollouts.retokenize import Retokenizer
from fx_influence.losses import group_advantages

NUMBER = (int, float)
TRL_COLUMNS = ("step", "prompt", "completion", "advantage")
VERL_UID = re.compile(r"((.+)_\d+)_\d+", re.DOTALL)
"""The session, and in it the prompt, of a ``uid`` ``<prompt>_<session>_<output>``."""


def read_verl(files: Sequence[Path], retokenizer: Retokenizer, scale: bool = True) -> list[Rollout]:
    """Rollouts of verl's ``trainer.rollout_data_dir``, ``<step>.jsonl``: retokenised, with group-relative advantages.

    A record has the texts ``input`` and ``output``, the reward ``score`` and ``step``. The trainers of
    verl/trainer/ppo/v1 add ``uid``, ``<prompt>_<session>_<output>``, which tells the groups; without it, equal inputs
    of a step are one. Where a session has several outputs, its last is judged in the group and all share its
    advantage, as in verl. verl decodes with ``skip_special_tokens=True`` and without its masks: the markers of a chat
    template are gone from both texts, so the prompt is not quite what the policy saw, and what a tool wrote inside
    ``output`` cannot be told from what was sampled.

    Source: verl-project/verl, verl/trainer/ppo/v1/trainer_base.py at commit 39574b5 (``_log_rollout_data``,
    ``_write_generations``), v1/utils.py at 1117b4a (``compute_advantage_for_multi_trajectories``) and
    verl/trainer/ppo/ray_trainer.py at d163ff3 (``_dump_generations``, without ``uid``).
    """

    def parse(index: int, record: dict[str, Any]) -> tuple[Rollout, tuple[Any, ...]]:
        prompt, completion = (field(record, name, (str,), "a string") for name in ("input", "output"))
        step = field(record, "step", (int,), "an integer")
        uid = field({"uid": "", **record}, "uid", (str,), "a string")
        known = VERL_UID.fullmatch(uid)
        rollout = retokenizer.rollout(uid if known else str(index), prompt, completion, _truncated(record))
        reward = float(field(record, "score", NUMBER, "a number"))
        return dataclasses.replace(rollout, reward=reward), (step, known[2] if known else uid or rollout.prompt_ids)

    return _with_group_advantages(number_prompts(read_json_lines(files, parse)), scale)


def read_trl(path: Path, retokenizer: Retokenizer, reward_weights: Mapping[str, float] | None = None) -> list[Rollout]:
    """Rollouts of TRL's ``completions/completions_<step>.parquet`` (``log_completions=True``): retokenised.

    The columns are ``step``, ``prompt`` and ``completion`` (texts, or lists of messages), one for each reward
    function, those of ``log_extra``, and ``advantage``, which is kept as it is. Equal prompts of a step are one group.
    The reward is the one column of numbers beside these, or the sum over ``reward_weights``, of each row's columns that
    are neither null nor NaN (a function that returned ``None``); of several columns without ``reward_weights``, none.

    Raises ``ValueError`` for other columns, and by row (from 0) for a bad one. ``ImportError`` without pyarrow.
    Source: trl 1.16.0, trl/trainer/grpo_trainer.py, ``GRPOTrainer.log``.
    """
    rows, numeric = _parquet(path)
    weights = _reward_columns(numeric, reward_weights)

    def parse(index: int, row: dict[str, Any]) -> tuple[Rollout, tuple[Any, ...]]:
        # A NaN is what a null is: a function of the reward that returned None.
        values = {name: row[name] for name in weights if row[name] is not None and not math.isnan(row[name])}
        for name, value in {"advantage": row["advantage"], **values}.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"column {name!r} holds {value}, which is not finite; repair it first")
        step = field(row, "step", (int,), "an integer")
        advantage = float(field(row, "advantage", NUMBER, "a number; pandas writes NaN as null"))
        rollout = retokenizer.rollout(str(index), row["prompt"], row["completion"], _truncated(row))
        rewards = [weights[name] * value for name, value in values.items()]
        reward = float(sum(rewards)) if rewards else None
        return dataclasses.replace(rollout, reward=reward, advantage=advantage), (step, rollout.prompt_ids)

    return number_prompts(read_all(((f"{path}, row {place}", row) for place, row in enumerate(rows)), parse))


def _with_group_advantages(rollouts: list[Rollout], scale: bool) -> list[Rollout]:
    sessions = [known[1] if (known := VERL_UID.fullmatch(r.id)) else r.id for r in rollouts]
    # verl sorts by prompt, session and output, so that a session's last output is its last row here.
    last = dict(zip(sessions, rollouts, strict=True))
    rewards = torch.tensor([r.reward for r in last.values()], dtype=torch.float64)
    group = torch.tensor([r.group for r in last.values()], dtype=torch.int64)
    advantages = dict(zip(last, group_advantages(rewards, group, scale).tolist(), strict=True))
    return [dataclasses.replace(r, advantage=advantages[s]) for s, r in zip(sessions, rollouts, strict=True)]


def _truncated(record: dict[str, Any]) -> bool | None:
    if record.get("truncated") is None:
        return None
    truncated: bool = field(record, "truncated", (bool,), "a boolean")
    return truncated


def _parquet(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, and the columns of numbers that may be rewards."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("reading parquet needs pyarrow: pip install 'fx-influence[parquet]'") from error
    try:
        # Not read_table, which also makes columns of the names of the directories.
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"rollouts file {str(path)!r} is not parquet ({error}); give TRL's own file") from error
    missing = [name for name in TRL_COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(
            f"rollouts file {str(path)!r} has the columns {table.column_names}; TRL's completions have "
            f"{list(TRL_COLUMNS)} (missing: {missing})"
        )
    kinds = pyarrow.types
    numeric = [f.name for f in table.schema if kinds.is_floating(f.type) or kinds.is_integer(f.type)]
    return table.to_pylist(), [name for name in numeric if name not in TRL_COLUMNS]


def _reward_columns(numeric: list[str], weights: Mapping[str, float] | None) -> Mapping[str, float]:
    if weights is None:
        return {numeric[0]: 1.0} if len(numeric) == 1 else {}
    unknown = [name for name in weights if name not in numeric]
    if unknown:
        raise ValueError(f"reward_weights names {unknown}; the file's columns of numbers are {numeric}")
    return weights
