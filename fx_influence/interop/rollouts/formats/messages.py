"""Rollouts recorded as conversations: results of verifiers, episodes of rllm."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fx_influence.interop.rollouts.advantages import with_group_advantages
from fx_influence.interop.rollouts.files import lines
from fx_influence.interop.rollouts.formats.token_formats import NUMBER
from fx_influence.interop.rollouts.jsonl import field, json_object, parse_all, read_json_lines
from fx_influence.interop.rollouts.record import Rollout, number_prompts, source_of
from fx_influence.interop.rollouts.retokenize import Retokenizer


def read_verifiers(files: Sequence[Path], retokenizer: Retokenizer, scale: bool = True) -> list[Rollout]:
    """Read rollouts of verifiers' ``results.jsonl``: retokenised.

    A record has ``example_id``, ``prompt`` and ``completion`` (messages or texts), ``reward`` and ``is_truncated``.
    Rows of one ``example_id`` are one prompt. Advantages are ``losses.group_advantages`` of the rewards.

    Raises:
        ValueError: by line, also for a rollout without a completion, which an error of the environment leaves.

    Source: PrimeIntellect-ai/verifiers, verifiers/legacy/utils/save_utils.py at commit a60a606 (``state_to_output``).
    """

    def parse(index: int, record: dict[str, Any]) -> tuple[Rollout, Any]:
        example = field(record, "example_id", (int, str), "an integer or a string")
        prompt, completion = record.get("prompt"), record.get("completion")
        if not completion:
            raise ValueError("field 'completion' is empty; expected messages or a text. Drop this record")
        truncated = field({"is_truncated": None, **record}, "is_truncated", (bool, type(None)), "a boolean")
        rollout = retokenizer.rollout(str(index), prompt, completion, truncated)
        reward = float(field(record, "reward", NUMBER, "a number"))
        info = record.get("info")
        source = source_of(record) or source_of(info if isinstance(info, dict) else {})
        return dataclasses.replace(rollout, reward=reward, source=source), example

    return with_group_advantages(number_prompts(read_json_lines(files, parse)), scale)


def read_rllm(files: Sequence[Path], retokenizer: Retokenizer, scale: bool = True) -> list[Rollout]:
    """Read rollouts of rllm's ``episodes/train_step_<n>_epoch_<m>/episode_*.json``: retokenised.

    Each trajectory of an episode is a rollout, whose conversation is that of its last step, if each step continues the
    one before. Trajectories of one name and task are one prompt. Advantages are ``losses.group_advantages`` of the
    rewards.

    Raises:
        ValueError: by file, for steps that do not continue each other, each of which would be a rollout of its own.

    Source: rllm-org/rllm, rllm/utils/episode_logger.py at commit 9beb6e0 (``log_episode``).
    """

    def parse(_: int, path: Path) -> list[tuple[Rollout, Any]]:
        record = json_object(b"".join(lines(path)))
        task = field(record, "task_hash", (str,), "a string")
        episode = field(record, "episode_id", (str,), "a string")
        truncated = record.get("termination_reason") == "max_response_length_exceeded"
        parsed = []
        for trajectory in field(record, "trajectories", (list,), "a list"):
            prompt, completion = _conversation(trajectory)
            name = f"{episode}/{trajectory.get('uid') or trajectory.get('name')}"
            rollout = retokenizer.rollout(name, prompt, completion, truncated or None)
            reward = float(field(trajectory, "reward", NUMBER, "a number"))
            source = source_of(record["task"]) if isinstance(record.get("task"), dict) else None
            key = (record.get("training_step"), task, trajectory.get("name"))
            parsed.append((dataclasses.replace(rollout, reward=reward, source=source), key))
        return parsed

    episodes = parse_all(((str(path), path) for path in files), parse)
    return with_group_advantages(number_prompts(pair for pairs in episodes for pair in pairs), scale)


def _conversation(trajectory: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Return the messages before the first answer of a trajectory, and those from it on."""
    steps = field(trajectory, "steps", (list,), "a list of steps")
    chats = [field(step, "chat_completions", (list,), "a list of messages") for step in steps]
    for earlier, later in pairwise(chats):
        if _comparable(later)[: len(earlier)] != _comparable(earlier):
            raise ValueError(
                "field 'steps' has one that does not continue the one before; expected one conversation. Read rollouts "
                "of single steps from verl's rollout_data_dir"
            )
    last = chats[-1] if chats else []
    answers = [i for i, message in enumerate(last) if isinstance(message, dict) and message.get("role") == "assistant"]
    if not answers:
        raise ValueError("a trajectory has no answer; expected a message of the assistant. Drop this file")
    return last[: answers[0]], last[answers[0] :]


def _comparable(messages: list[Any]) -> list[str]:
    return [json.dumps(message, sort_keys=True, default=str) for message in messages]
