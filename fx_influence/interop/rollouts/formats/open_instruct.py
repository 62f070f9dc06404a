"""Rollouts of open-instruct's ``save_traces``: token ids, rewards and advantages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fx_influence.interop.rollouts.formats.token_formats import NUMBER, decode, optional_numbers, token_ids
from fx_influence.interop.rollouts.jsonl import field, read_json_lines
from fx_influence.interop.rollouts.record import Rollout, number_prompts, source_of


def read_open_instruct(files: Sequence[Path], tokenizer: Any = None) -> list[Rollout]:
    """Read rollouts of ``<run>_rollouts_<shard>.jsonl``.

    A record has ``step``, ``sample_idx``, ``prompt_idx``, ``prompt_tokens``, ``response_tokens``, ``reward``,
    ``advantage``, ``finish_reason``, ``dataset`` and, in some, ``logprobs``. Equal ``prompt_idx`` of a step are one
    prompt; ``dataset`` is the source.

    Raises:
        ValueError: by line, for a rollout that called a tool: the file does not say which tokens the tool wrote.

    Source: allenai/open-instruct, open_instruct/rl_utils.py (``RolloutRecord``, ``_save_rollouts``) at commit e6c3044.
    """

    def parse(_: int, record: dict[str, Any]) -> tuple[Rollout, tuple[int, int]]:
        step, sample, prompt = (
            field(record, name, (int,), "an integer") for name in ("step", "sample_idx", "prompt_idx")
        )
        info = record.get("request_info")
        if isinstance(info, dict) and info.get("tool_calleds"):
            raise ValueError(
                "field 'request_info' says that a tool was called; expected no tool, since open-instruct does not "
                "record which tokens the policy sampled. Drop this record"
            )
        prompt_ids = token_ids(record, "prompt_tokens")
        completion_ids = token_ids(record, "response_tokens")
        dataset = record.get("dataset")
        rollout = Rollout(
            id=f"{step}/{sample}",
            prompt_id="",
            group=0,
            prompt=decode(tokenizer, prompt_ids, skip_special_tokens=False),
            completion=decode(tokenizer, completion_ids, skip_special_tokens=True),
            prompt_ids=prompt_ids,
            completion_ids=completion_ids,
            finished=field(record, "finish_reason", (str,), "a string") == "stop",
            behaviour_logprobs=optional_numbers(record, "logprobs"),
            reward=float(field(record, "reward", NUMBER, "a number")),
            advantage=float(field(record, "advantage", NUMBER, "a number")),
            source=source_of({"source": dataset[0] if isinstance(dataset, list) and len(dataset) == 1 else dataset}),
        )
        return rollout, (step, prompt)

    return number_prompts(read_json_lines(files, parse))
