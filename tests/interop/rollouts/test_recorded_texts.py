"""Trainers that record texts or messages: AReaL, SkyRL, ms-swift, ROLL, verifiers, rllm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.rollout_writers import BOS, EOS, PROMPT, SAMPLED, TOKENIZER, ids
from helpers.trainer_writers import (
    areal_record,
    roll_table,
    skyrl_record,
    swift_table,
    verifiers_record,
    write_lines,
    write_rllm,
)

from fx_influence.interop.rollouts.read import read_rollouts

CHAT = TOKENIZER.apply_chat_template([{"role": "user", "content": "1+1="}], tokenize=False, add_generation_prompt=True)
START = 2
"""Id of ``<|im_start|>``."""


def test_areal_values_are_those_written(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "2" / "8.jsonl", areal_record(0), areal_record(1, completion="23", reward=0.5))
    rollouts = read_rollouts(path, TOKENIZER, scale=False)
    assert [(r.id, r.group, r.reward, r.advantage, r.finished) for r in rollouts] == [
        ("2/8/0", 0, 0.0, -0.25, True),
        ("2/8/1", 0, 0.5, 0.25, False),
    ]
    assert rollouts[0].prompt_ids == (BOS, START, *PROMPT, *ids("\n"))
    assert [r.completion_ids for r in rollouts] == [SAMPLED, ids("23")]
    bad = write_lines(tmp_path / "bad.jsonl", areal_record(0), areal_record(1, seqlen=10))
    with pytest.raises(ValueError, match=r"line 2: the texts have 7 and 2 tokens; expected 7 and 3"):
        read_rollouts(bad, TOKENIZER)


def test_skyrl_values_are_those_written(tmp_path: Path) -> None:
    """A directory has a file for each data set, and one of metrics, which holds no rollouts."""
    write_lines(tmp_path / "gsm8k.jsonl", skyrl_record(1.0), skyrl_record([0.0, 0.5], output_response="3"))
    write_lines(tmp_path / "aime.jsonl", skyrl_record(0.0, data_source="aime"))
    write_lines(tmp_path / "aggregated_results.jsonl", {"eval/all/avg_score": 0.5})
    rollouts = read_rollouts(tmp_path, TOKENIZER, scale=False)
    assert [(r.id, r.group, r.source, r.reward, r.advantage, r.finished) for r in rollouts] == [
        ("0", 0, "aime", 0.0, 0.0, True),
        ("1", 1, "openai/gsm8k", 1.0, 0.25, True),
        ("2", 1, "openai/gsm8k", 0.5, -0.25, False),
    ]
    assert rollouts[0].prompt_ids == (BOS, *PROMPT)


def test_swift_values_are_those_written(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "completions.jsonl", swift_table(), swift_table(step=["6"] * 3))
    rollouts = read_rollouts(path, TOKENIZER, reward_weights={"Accuracy": 1.0, "Length": 2.0})
    assert [r.group for r in rollouts] == [0, 0, 1, 2, 2, 3]
    assert [(r.id, r.reward, r.advantage) for r in rollouts[:3]] == [("0", 1.0, 1.5), ("1", 1.0, -1.5), ("2", 3.0, 0.0)]
    assert rollouts[0].prompt_ids == (BOS, START, *PROMPT)
    assert (rollouts[0].completion_ids, rollouts[0].approximate) == (SAMPLED, True)
    assert read_rollouts(path, TOKENIZER)[0].reward is None
    with pytest.raises(ValueError, match=r"expected the file's columns of numbers, \['Accuracy', 'Length'\]"):
        read_rollouts(path, TOKENIZER, reward_weights={"num_turns": 1.0})
    bad = write_lines(tmp_path / "bad.jsonl", swift_table(advantages=[1.0, None, 0.0]))
    with pytest.raises(ValueError, match=r"table 0 of .*row 1: field 'advantages' is None"):
        read_rollouts(bad, TOKENIZER)
    short = write_lines(tmp_path / "short.jsonl", swift_table(advantages=[1.0]))
    with pytest.raises(ValueError, match=r"line 1: the columns have the lengths .*; expected one length"):
        read_rollouts(short, TOKENIZER)


def test_roll_values_are_those_written(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rollout_dump_data.step_2.jsonl", roll_table())
    rollouts = read_rollouts(path, TOKENIZER, scale=False)
    assert [(r.group, r.reward, r.advantage, r.source) for r in rollouts] == [
        (0, 1.0, 0.5, "math"),
        (0, 0.0, -0.5, "math"),
        (1, 1.0, 0.0, "code"),
    ]
    assert (rollouts[0].prompt, rollouts[0].completion_ids) == (CHAT, SAMPLED)
    assert rollouts[0].prompt_ids == tuple(TOKENIZER(CHAT, add_special_tokens=False)["input_ids"])
    plain = read_rollouts(write_lines(tmp_path / "plain.jsonl", roll_table(messages=[None] * 3)), TOKENIZER)
    assert plain[0].prompt_ids == (BOS, *PROMPT)


def expected_turns() -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Return the tokens of two answers around a tool's output, and which of them were sampled."""
    between = tuple(
        TOKENIZER("\n<|im_start|>tool\n[9]<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    )
    tokens = (*ids("2"), EOS, *between, *ids("3"), EOS)
    return tokens, (True, True, *([False] * len(between)), True, True)


def test_verifiers_values_are_those_written(tmp_path: Path) -> None:
    records = [verifiers_record(7, 1.0), verifiers_record(7, 0.0, is_truncated=True), verifiers_record(9, 1.0)]
    rollouts = read_rollouts(write_lines(tmp_path / "results.jsonl", *records), TOKENIZER, scale=False)
    assert [(r.group, r.reward, r.advantage, r.finished, r.source) for r in rollouts] == [
        (0, 1.0, 0.5, True, "wiki"),
        (0, 0.0, -0.5, False, "wiki"),
        (1, 1.0, 0.0, True, "wiki"),
    ]
    assert (rollouts[0].completion_ids, rollouts[0].completion_mask) == expected_turns()
    assert rollouts[0].prompt == CHAT
    failed = write_lines(tmp_path / "bad.jsonl", records[0], verifiers_record(7, 0.0, completion=None))
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: field 'completion' is empty.*Drop this record"):
        read_rollouts(failed, TOKENIZER)


def test_rllm_values_are_those_written(tmp_path: Path) -> None:
    for number, reward in ((0, 1.0), (10, 0.0), (9, 0.5)):
        write_rllm(tmp_path, number, reward)
    (tmp_path / "batch_summary.json").write_text("{}")
    rollouts = read_rollouts(tmp_path, TOKENIZER, scale=False)
    assert [(r.id, r.group, r.reward, r.advantage, r.source) for r in rollouts] == [
        ("t:0/u0", 0, 1.0, 0.5, "aime"),
        ("t:9/u9", 0, 0.5, 0.0, "aime"),
        ("t:10/u10", 0, 0.0, -0.5, "aime"),
    ]
    assert (rollouts[0].completion_ids, rollouts[0].completion_mask) == expected_turns()


@pytest.mark.parametrize(
    ("reward", "changes", "message"),
    [
        (0.0, {"steps": [{"chat_completions": [{"role": "user", "content": "x"}]}]}, "has no answer"),
        (None, {}, "field 'reward' is None"),
    ],
)
def test_rllm_refuses_by_file(reward: float | None, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_rllm(tmp_path, 3, reward, **changes)
    with pytest.raises(ValueError, match=rf"{path.name}: .*{message}"):
        read_rollouts(path, TOKENIZER)


def test_rllm_refuses_steps_that_do_not_continue(tmp_path: Path) -> None:
    steps = [{"chat_completions": [{"role": "user", "content": c}, {"role": "assistant", "content": c}]} for c in "12"]
    with pytest.raises(ValueError, match="one that does not continue the one before"):
        read_rollouts(write_rllm(tmp_path, 3, 0.0, steps=steps), TOKENIZER)
