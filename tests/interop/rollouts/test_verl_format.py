"""Rollouts of verl: texts tokenised again, advantages computed from scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rollout_writers import (
    BOS,
    EOS,
    PROMPT,
    SAMPLED,
    TOKENIZER,
    ids,
    make_tokenizer,
    write_verl,
)

from fx_influence.interop.rollouts.read import read_rollouts
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.losses import group_advantages

VERL: dict[str, list[Any]] = {"input": ["1+1=", "1+1=", "3="], "output": ["2", "3", "3"], "score": [1.0, 0.0, 0.25]}


def test_verl_groups_equal_inputs(tmp_path: Path) -> None:
    rollouts = read_rollouts(write_verl(tmp_path / "5.jsonl", VERL), TOKENIZER)
    assert rollouts[0] == Rollout(
        id="0",
        prompt_id="0",
        group=0,
        prompt="1+1=",
        completion="2",
        prompt_ids=(BOS, *PROMPT),
        completion_ids=SAMPLED,
        finished=True,
        reward=1.0,
        advantage=rollouts[0].advantage,
        approximate=True,
    )
    expected = group_advantages(torch.tensor(VERL["score"], dtype=torch.float64), torch.tensor([0, 0, 1]))
    assert [r.advantage for r in rollouts] == expected.tolist()
    assert [(r.id, r.group) for r in rollouts] == [("0", 0), ("1", 0), ("2", 1)]


def test_verl_extra_information_names_the_source(tmp_path: Path) -> None:
    batch = {**VERL, "data_source": ["openai/gsm8k", "", None]}
    rollouts = read_rollouts(write_verl(tmp_path / "5.jsonl", batch), TOKENIZER)
    assert [r.source for r in rollouts] == ["openai/gsm8k", None, None]


def test_verl_advantages_are_unscaled_on_request(tmp_path: Path) -> None:
    path = write_verl(tmp_path / "5.jsonl", VERL)
    assert [r.advantage for r in read_rollouts(path, TOKENIZER, scale=False)] == [0.5, -0.5, 0.0]


def test_verl_equal_inputs_of_two_steps_are_two_groups(tmp_path: Path) -> None:
    one, two = (write_verl(tmp_path / f"{step}.jsonl", VERL, step).read_text() for step in (5, 6))
    (tmp_path / "both.jsonl").write_text(one + two)
    assert [r.group for r in read_rollouts(tmp_path / "both.jsonl", TOKENIZER)] == [0, 0, 1, 2, 2, 3]


def test_verl_uid_decides_groups_and_last_outputs(tmp_path: Path) -> None:
    uid = ["a_0_0", "a_0_1", "a_1_0", "b_0_0", "b_1_0"]
    outputs = ["1", "2", "3", "4", "5"]
    batch: dict[str, list[Any]] = {
        "input": ["1+1="] * 5,
        "output": outputs,
        "score": [9.0, 1.0, 0.0, 1.0, 0.0],
        "uid": uid,
    }
    rollouts = read_rollouts(write_verl(tmp_path / "5.jsonl", batch), TOKENIZER, scale=False)
    assert [(r.id, r.group, r.advantage) for r in rollouts] == [
        ("a_0_0", 0, 0.5),
        ("a_0_1", 0, 0.5),
        ("a_1_0", 0, -0.5),
        ("b_0_0", 1, 0.5),
        ("b_1_0", 1, -0.5),
    ]


def test_verl_uid_without_session_decides_groups(tmp_path: Path) -> None:
    path = write_verl(tmp_path / "5.jsonl", {**VERL, "uid": ["x-1", "x-2", "x-1"]})
    assert [(r.id, r.group) for r in read_rollouts(path, TOKENIZER)] == [("0", 0), ("1", 1), ("2", 0)]


def test_verl_truncated_completion_has_no_eos(tmp_path: Path) -> None:
    path = write_verl(tmp_path / "5.jsonl", {**VERL, "output": ["12", "345", "6"], "truncated": [None, False, True]})
    rollouts = read_rollouts(path, TOKENIZER, max_completion_length=2)
    assert [(r.completion_ids, r.finished) for r in rollouts] == [
        (ids("12"), False),
        ((*ids("345"), EOS), True),
        (ids("6"), False),
    ]


def test_verl_refuses_text_with_unknown_tokens(tmp_path: Path) -> None:
    path = write_verl(tmp_path / "5.jsonl", {**VERL, "output": ["2", "1é2", "2"]})
    with pytest.raises(ValueError, match=r"5\.jsonl, line 2: .*does not survive the tokenizer: 'é2' at character 1"):
        read_rollouts(path, TOKENIZER)


def test_verl_refuses_half_of_a_surrogate_pair(tmp_path: Path) -> None:
    path = tmp_path / "5.jsonl"
    path.write_text('{"input": "1", "output": "2\\ud800", "score": 1, "step": 1}\n')
    with pytest.raises(ValueError, match="line 1: field 'completion' holds half of a surrogate pair at 1"):
        read_rollouts(path, TOKENIZER)


def test_verl_does_not_double_eos_in_text(tmp_path: Path) -> None:
    path = write_verl(tmp_path / "5.jsonl", {**VERL, "output": ["2<|im_end|>"] * 3})
    assert read_rollouts(path, TOKENIZER)[0].completion_ids == SAMPLED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": [1.0, "high", 0.0]}, "field 'score' is 'high'; expected a number"),
        ({"score": [1.0, True, 0.0]}, "field 'score' is True"),
        ({"score": [1.0, 10**400, 0.0]}, "int too large"),
        ({"output": ["2", None, "3"]}, "field 'output' is None; expected a string"),
        ({"truncated": [None, "yes", None]}, "field 'truncated' is 'yes'; expected a boolean"),
    ],
)
def test_verl_refuses_field_of_another_type(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_verl(tmp_path / "5.jsonl", {**VERL, **changes})
    with pytest.raises(ValueError, match=f"5.jsonl, line 2: .*{message}"):
        read_rollouts(path, TOKENIZER)


def test_verl_needs_tokenizer_with_eos(tmp_path: Path) -> None:
    path = write_verl(tmp_path / "5.jsonl", VERL)
    with pytest.raises(ValueError, match="tokenizer is None; expected the policy's own"):
        read_rollouts(path)
    with pytest.raises(ValueError, match=r"tokenizer.eos_token is None"):
        read_rollouts(path, make_tokenizer(eos=None))
