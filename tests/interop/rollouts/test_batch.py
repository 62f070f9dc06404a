"""Batches of rollouts: masks, padding, coefficients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.made_rollouts import EOS, PAD, rollout

from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.native_format import read_native_rollouts, write_rollouts


def test_collate_keeps_eos_that_is_also_padding() -> None:
    short = rollout("a/0", group=3)
    long = rollout("b/0", group=7, prompt_ids=(EOS, 4), completion_ids=(6, 7, 8, EOS), behaviour_logprobs=(-1.0,) * 4)
    batch = collate([short, long], PAD)
    assert batch.input_ids.tolist() == [[4, 9, 4, 5, EOS, PAD], [EOS, 4, 6, 7, 8, EOS]]
    assert batch.attention_mask.tolist() == [[True] * 5 + [False], [True] * 6]
    assert batch.completion_mask.tolist() == [[False] * 3 + [True] * 2 + [False], [False] * 2 + [True] * 4]
    assert batch.group is not None
    assert batch.group.tolist() == [3, 7]
    assert batch.input_ids.dtype == batch.group.dtype == torch.int64
    assert batch.coefficients is None
    assert batch.entropy_coefficients is None


def test_collate_accepts_empty_completion() -> None:
    batch = collate([rollout(completion_ids=(), behaviour_logprobs=()), rollout()], PAD)
    assert batch.completion_mask.sum(-1).tolist() == [0, 2]
    assert batch.attention_mask.sum(-1).tolist() == [3, 5]


def test_collate_refuses_no_rollouts_or_empty_prompt() -> None:
    with pytest.raises(ValueError, match="rollouts is empty"):
        collate([], PAD)
    with pytest.raises(ValueError, match="prompt_ids of rollout 'q/1' is empty"):
        collate([rollout(), rollout("q/1", prompt_ids=())], PAD)


def test_collate_applies_mask_and_coefficients(tmp_path: Path) -> None:
    tool = rollout(
        completion_mask=(False, True), behaviour_logprobs=None, coefficients=(0.0, 0.5), entropy_coefficients=(0.0, 2.0)
    )
    other = rollout("q/0", prompt_ids=(4,), coefficients=(0.25, -1.0), entropy_coefficients=(0.0, 0.0))
    write_rollouts(tmp_path / "r.jsonl", [tool, other])
    assert read_native_rollouts(tmp_path / "r.jsonl") == [tool, other]
    batch = collate([tool, other], PAD)
    start = len(tool.prompt_ids)
    assert batch.completion_mask[0].nonzero().flatten().tolist() == [start + 1]
    assert batch.completion_mask[1].nonzero().flatten().tolist() == [1, 2]
    assert batch.coefficients is not None
    assert batch.entropy_coefficients is not None
    assert batch.coefficients[0].tolist() == [0.0] * (start + 1) + [0.5]
    assert batch.coefficients[1, :3].tolist() == [0.0, 0.25, -1.0]
    assert batch.entropy_coefficients[0, start + 1].item() == 2.0


def test_collate_takes_behaviour_logprobs_off_policy() -> None:
    first, other = (
        rollout(),
        rollout("q/0", prompt_ids=(4,), completion_ids=(5, 6, EOS), behaviour_logprobs=(-1, -2, -3)),
    )
    assert collate([first, other], PAD).behaviour_logprobs is None
    behaviour = collate([first, other], PAD, off_policy=True).behaviour_logprobs
    assert behaviour is not None
    assert behaviour.dtype == torch.float64
    assert behaviour[1, 1:4].tolist() == [-1.0, -2.0, -3.0]
    with pytest.raises(ValueError, match=r"behaviour_logprobs of rollout 'a/1' is None with off_policy=True"):
        collate([first, rollout("a/1", behaviour_logprobs=None)], PAD, off_policy=True)


def test_collate_leaves_out_incomplete_coefficients() -> None:
    assert collate([rollout(coefficients=(1.0, 2.0)), rollout("q/0")], PAD).coefficients is None
