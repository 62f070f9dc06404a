"""Rollouts of slime's ``--save-debug-rollout-data``: token ids, masks, log-probs and rewards, in files of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fx_influence.interop.checkpoints.files.unpickle import load_inert
from fx_influence.interop.rollouts.advantages import with_group_advantages
from fx_influence.interop.rollouts.formats.token_formats import NUMBER, decode, optional_numbers, token_ids
from fx_influence.interop.rollouts.jsonl import field, fields, parse_all
from fx_influence.interop.rollouts.record import Rollout, number_prompts, source_of


def read_slime(
    files: Sequence[Path], tokenizer: Any, scale: bool, reward_weights: Mapping[str, float] | None
) -> list[Rollout]:
    """Read rollouts of ``<rollout_id>.pt`` (a dict with ``samples``), of which nothing but plain values is built.

    A sample has ``tokens`` of prompt and response, ``response_length``, ``loss_mask`` and ``rollout_log_probs`` over
    the response or None, ``reward``, ``status``, ``group_index`` and ``index``. Equal ``group_index`` are one prompt.
    Advantages are ``losses.group_advantages`` of the rewards, so rollouts are ``approximate``. A sample with
    ``remove_sample`` counts with no token.

    Args:
        files: the files.
        tokenizer: the policy's, or None for no texts.
        scale: whether advantages are scaled, see ``losses.group_advantages``.
        reward_weights: weights by key, for rewards that are dicts.

    Source: THUDM/slime, slime/observability/rollout_data_utils.py (``save_debug_rollout_data``) and
    slime/utils/types.py (``Sample.to_dict``) at commit 624b824.
    """
    samples: list[tuple[str, tuple[Any, Any]]] = []
    for path in files:
        saved = load_inert(path)
        if not isinstance(saved, dict) or not isinstance(saved.get("samples"), list):
            raise ValueError(f"{path} has no list 'samples'; expected slime's own file of rollouts. Check the path")
        samples += [(f"{path}, sample {i}", (saved.get("rollout_id"), x)) for i, x in enumerate(saved["samples"])]

    def parse(_: int, sample: tuple[Any, Any]) -> tuple[Rollout, tuple[Any, ...]]:
        step, record = sample[0], _plain(sample[1])
        tokens = token_ids(record, "tokens")
        length = field(record, "response_length", (int,), "an integer")
        if not 0 <= length <= len(tokens):
            raise ValueError(f"field 'response_length' is {length}; expected 0 to {len(tokens)}, the number of tokens")
        start = len(tokens) - length
        mask = [1] * length if record.get("loss_mask") is None else fields(record, "loss_mask", (int,), "0 or 1")
        counts = tuple(value == 1 and record.get("remove_sample") is not True for value in mask)
        prompt_ids, completion_ids = tokens[:start], tokens[start:]
        rollout = Rollout(
            id=f"{step}/{field(record, 'index', (int,), 'an integer')}",
            prompt_id="",
            group=0,
            prompt=decode(tokenizer, prompt_ids, skip_special_tokens=False),
            completion=decode(tokenizer, completion_ids, skip_special_tokens=True),
            prompt_ids=prompt_ids,
            completion_ids=completion_ids,
            finished=record.get("status") == "completed",
            behaviour_logprobs=optional_numbers(record, "rollout_log_probs"),
            reward=_reward(record, reward_weights),
            completion_mask=None if all(counts) and len(counts) == length else counts,
            approximate=True,
            source=source_of(record.get("metadata") or {}),
        )
        return rollout, (step, record.get("group_index", prompt_ids))

    return with_group_advantages(number_prompts(parse_all(samples, parse)), scale)


def _plain(record: Any) -> dict[str, Any]:
    """Return the sample with lists in place of tensors."""
    if not isinstance(record, dict):
        raise ValueError(f"this holds {type(record).__name__}; expected a dict, as Sample.to_dict gives")
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in record.items()}


def _reward(record: dict[str, Any], weights: Mapping[str, float] | None) -> float:
    """Return the reward, or the weighted sum of a dict of them."""
    reward = record.get("reward")
    if not isinstance(reward, dict):
        return float(field(record, "reward", NUMBER, "a number"))
    if weights is None or not set(weights) <= set(reward):
        raise ValueError(
            f"field 'reward' has the keys {sorted(reward)}; expected a number, or reward_weights over them. Pass "
            "reward_weights={key: 1.0} for the reward that was trained on"
        )
    return float(sum(weight * field(reward, name, NUMBER, "a number") for name, weight in weights.items()))
