"""Rollouts of prime-rl and NeMo-RL, which record token ids: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.rollout_writers import (
    EOS,
    PAD,
    PROMPT,
    SAMPLED,
    TOKENIZER,
    TOOL,
    ids,
    prime_record,
    write_nemo_rl,
    write_prime_rl,
)

from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.read import read_rollouts
from fx_influence.interop.rollouts.record import Rollout


def nemo_batch(**changes: Any) -> dict[str, list[Any]]:
    """Return two samples of one prompt, of 6 and 5 tokens, padded to 8."""
    batch = {
        "content": [["1+1=", "2"], ["1+1=", ""]],
        "rewards": [1.0, 0.0],
        "input_lengths": [6, 5],
        "token_ids": [[*PROMPT, *SAMPLED, PAD, PAD], [*PROMPT, EOS, PAD, PAD, PAD]],
        "token_loss_mask": [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]],
        "sample_loss_mask": [1.0, 1.0],
        "advantages": [[0.7] * 8, [-0.7] * 8],
        "generation_logprobs": [[0.0] * 4 + [-0.5, -0.25, 0.0, 0.0], [0.0] * 4 + [-2.0, 0.0, 0.0, 0.0]],
        "prev_logprobs": [[0.0] * 8, [0.0] * 8],
    }
    return {**batch, **changes}


def test_prime_rl_is_read_token_by_token(tmp_path: Path) -> None:
    (rollout,) = read_rollouts(write_prime_rl(tmp_path / "rank_1.jsonl", [prime_record()]))
    assert rollout == Rollout(
        id="7/1/0",
        prompt_id="0",
        group=0,
        prompt="",
        completion="",
        prompt_ids=PROMPT,
        completion_ids=(*SAMPLED, *TOOL, *SAMPLED),
        finished=False,
        behaviour_logprobs=(-0.25, -0.25, 0.0, 0.0, 0.0, -0.25, -0.25),
        advantage=0.5,
        completion_mask=(True, True, False, False, False, True, True),
        source="sums",
    )
    assert collate([rollout], PAD).completion_mask[0].tolist() == prime_record()["loss_mask"]


def test_prime_rl_tokenizer_gives_texts_and_end(tmp_path: Path) -> None:
    cut = prime_record(1)
    cut["token_ids"] = [*PROMPT, *SAMPLED, *TOOL, *ids("22")]
    complete, cut_off = read_rollouts(write_prime_rl(tmp_path / "r.jsonl", [prime_record(), cut]), TOKENIZER)
    assert (complete.prompt, complete.completion, complete.finished) == ("1+1=", "2[9]2", True)
    assert (cut_off.completion, cut_off.finished) == ("2[9]22", False)


def test_prime_rl_first_version_has_rewards(tmp_path: Path) -> None:
    record = prime_record(rewards=[1.5] * 11, training_mode="rl")
    for name in ("export_step", "run_id", "rl_weights", "ce_weights", "ref_kl_weights"):
        del record[name]
    (rollout,) = read_rollouts(write_prime_rl(tmp_path / "r.jsonl", [record]))
    assert (rollout.id, rollout.reward) == ("6/1/0", 1.5)


def test_prime_rl_weights_scale_the_advantage(tmp_path: Path) -> None:
    record = prime_record(rl_weights=[0.0] * 4 + [3.0] * 2 + [0.0] * 3 + [3.0] * 2, rewards=[None] * 11)
    (rollout,) = read_rollouts(write_prime_rl(tmp_path / "r.jsonl", [record]))
    assert (rollout.advantage, rollout.reward) == (1.5, None)


def test_prime_rl_groups_equal_prompts_of_all_ranks(tmp_path: Path) -> None:
    other = prime_record(rank=10, token_ids=[*ids("2+1="), *prime_record()["token_ids"][4:]])
    write_prime_rl(tmp_path / "rank_10.jsonl", [other, prime_record(1, rank=10)])
    write_prime_rl(tmp_path / "rank_9.jsonl", [prime_record(rank=9)])
    rollouts = read_rollouts(tmp_path)
    assert [(r.id, r.group, r.prompt_id) for r in rollouts] == [
        ("7/9/0", 0, "0"),
        ("7/10/0", 1, "1"),
        ("7/10/1", 0, "0"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "'schema_version' is 2; expected 1"),
        ({"training_mode": "sft"}, "'training_mode' says that another loss"),
        ({"ce_weights": [0.0] * 10 + [0.1]}, "'ce_weights' says that another loss"),
        ({"ref_kl_weights": [0.1] * 11}, "'ref_kl_weights' says that another loss"),
        ({"advantages": [0.5] * 10 + [0.25]}, r"'advantages' differs .*\[0.25, 0.5\]"),
        ({"advantages": [None] * 11}, "the advantage of a sampled token is null"),
        ({"inference_logprobs": [None] * 11}, "the log-prob of a sampled token is null"),
        ({"inference_logprobs": [-0.5] * 10}, "logprobs has 10 values; expected 11"),
        ({"rl_weights": [1.0]}, "rl_weights has 1 values; expected 11"),
        ({"loss_mask": [1] * 11}, "field 'loss_mask' holds 1 at 0; expected booleans only"),
        ({"token_ids": [*PROMPT, *SAMPLED, *TOOL, 4.0, 5]}, "field 'token_ids' holds 4.0 at 9"),
        ({"token_ids": [True] * 11}, "field 'token_ids' holds True at 0; expected integers only"),
        ({"token_ids": [-1] * 11}, "the sequence holds -1; expected token ids"),
        ({"token_ids": "2"}, "field 'token_ids' is '2'; expected a list of integers"),
        ({"rank": None}, "field 'rank' is None; expected an integer"),
    ],
)
def test_prime_rl_refuses_inconsistent_record(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_prime_rl(tmp_path / "r.jsonl", [prime_record(), prime_record(1, **changes)])
    with pytest.raises(ValueError, match=f"r.jsonl, line 2: .*{message}"):
        read_rollouts(path)


def test_nemo_rl_is_read_without_padding(tmp_path: Path) -> None:
    first, second = read_rollouts(write_nemo_rl(tmp_path / "train_data_step3.jsonl", nemo_batch()), TOKENIZER)
    assert first == Rollout(
        id="0",
        prompt_id="0",
        group=0,
        prompt="1+1=",
        completion="2",
        prompt_ids=PROMPT,
        completion_ids=SAMPLED,
        finished=True,
        behaviour_logprobs=(-0.5, -0.25),
        reward=1.0,
        advantage=0.7,
    )
    assert (second.id, second.group, second.completion_ids, second.advantage) == ("1", 0, (EOS,), -0.7)


def test_nemo_rl_masks_sample_left_out_of_loss(tmp_path: Path) -> None:
    path = write_nemo_rl(tmp_path / "r.jsonl", nemo_batch(sample_loss_mask=[1.0, 0.0]))
    assert [r.completion_mask for r in read_rollouts(path)] == [None, (False,)]


def test_nemo_rl_sample_without_sampled_token_is_prompt(tmp_path: Path) -> None:
    batch = nemo_batch(token_loss_mask=[[0] * 8, [0] * 8])
    rollout = read_rollouts(write_nemo_rl(tmp_path / "r.jsonl", batch), TOKENIZER)[0]
    assert (rollout.prompt_ids, rollout.completion_ids) == ((*PROMPT, *SAMPLED), ())
    assert (rollout.finished, rollout.advantage) == (False, 0.7)


def test_nemo_rl_uses_filtered_rewards(tmp_path: Path) -> None:
    batch = nemo_batch(filtered_rewards=[0.5, 0.25], rewards=[9.0, 9.0, 9.0, 9.0])
    assert [r.reward for r in read_rollouts(write_nemo_rl(tmp_path / "r.jsonl", batch))] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantages": [[0.7] * 8, [0.1] * 4 + [0.2] * 4], "token_loss_mask": [[1] * 8] * 2}, "'advantages' differs"),
        ({"input_lengths": [6, 9]}, "'token_loss_mask' has 8 values; expected at least 9"),
        ({"token_loss_mask": [[0] * 8, [0, 0, 0, 0, 2, 0, 0, 0]]}, "'token_loss_mask' holds 2; expected 0 or 1"),
        ({"sample_loss_mask": [1.0, 0.5]}, "'sample_loss_mask' holds 0.5; expected 0 or 1"),
        ({"rewards": [1.0]}, "'rewards' holds 0 values; expected a list of one"),
    ],
)
def test_nemo_rl_refuses_inconsistent_record(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_nemo_rl(tmp_path / "r.jsonl", nemo_batch(**changes))
    with pytest.raises(ValueError, match=f"r.jsonl, line 2: .*{message}"):
        read_rollouts(path)
