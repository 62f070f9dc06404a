"""Rollouts of trainers that record texts with their special tokens: AReaL and SkyRL's evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fx_influence.interop.rollouts.advantages import with_group_advantages
from fx_influence.interop.rollouts.formats.token_formats import NUMBER
from fx_influence.interop.rollouts.jsonl import field, fields, read_json_lines
from fx_influence.interop.rollouts.record import Rollout, number_prompts, source_of
from fx_influence.interop.rollouts.retokenize import Retokenizer


def read_areal(files: Sequence[Path], retokenizer: Retokenizer, scale: bool = True) -> list[Rollout]:
    """Read rollouts of AReaL's ``rollout/<version>/<task>.jsonl`` (``dump_to_file``): retokenised.

    A record has ``prompt`` and ``completion``, decoded with special tokens, ``reward``, ``task_id``, ``sample_idx`` and
    the counts of tokens ``prompt_len`` and ``seqlen``. Those of one task are one prompt. Advantages are
    ``losses.group_advantages`` of the rewards.

    Raises:
        ValueError: by line, where the texts have other numbers of tokens than were recorded.

    Source: inclusionAI/AReaL, areal/infra/workflow_executor.py at commit 4aef98d (``_dump_trajectory``).
    """

    def parse(_: int, record: dict[str, Any]) -> tuple[Rollout, tuple[Any, ...]]:
        task, sample, total, before = (
            field(record, name, (int,), "an integer") for name in ("task_id", "sample_idx", "seqlen", "prompt_len")
        )
        version = field(record, "tail_version", (int,), "an integer")
        prompt, completion = (field(record, name, (str,), "a string") for name in ("prompt", "completion"))
        rollout = retokenizer.decoded(f"{version}/{task}/{sample}", prompt, completion)
        counts = len(rollout.prompt_ids), len(rollout.completion_ids)
        if counts != (before, total - before):
            raise ValueError(
                f"the texts have {counts[0]} and {counts[1]} tokens; expected {before} and {total - before}, as were "
                "recorded: they do not survive the tokenizer. Pass that of this training, or drop this record"
            )
        reward = float(field(record, "reward", NUMBER, "a number"))
        return dataclasses.replace(rollout, reward=reward, source=source_of(record)), (version, task)

    return with_group_advantages(number_prompts(read_json_lines(files, parse)), scale)


def read_skyrl(files: Sequence[Path], retokenizer: Retokenizer, scale: bool = True) -> list[Rollout]:
    """Read rollouts of SkyRL's ``dumped_evals/global_step_<n>_evals/<source>.jsonl``: retokenised.

    A record has ``input_prompt`` and ``output_response``, decoded with special tokens, ``score`` (or one a token, which
    add up), ``stop_reason`` and ``data_source``. Equal prompts of a source are one. Tokens of an environment inside
    ``output_response`` are not told from those sampled. Advantages are ``losses.group_advantages`` of the scores.

    Source: NovaSky-AI/SkyRL, skyrl/train/utils/trainer_utils.py at commit a956457 (``dump_per_dataset_eval_results``).
    """

    def parse(index: int, record: dict[str, Any]) -> tuple[Rollout, tuple[Any, ...]]:
        prompt, completion = (field(record, name, (str,), "a string") for name in ("input_prompt", "output_response"))
        rollout = retokenizer.decoded(str(index), prompt, completion)
        if type(record.get("score")) is list:
            reward = float(sum(fields(record, "score", NUMBER, "numbers")))
        else:
            reward = float(field(record, "score", NUMBER, "a number, or a list of them"))
        source = source_of(record)
        return dataclasses.replace(rollout, reward=reward, source=source), (source, rollout.prompt_ids)

    return with_group_advantages(number_prompts(read_json_lines(files, parse)), scale)
