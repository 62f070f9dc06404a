"""Trainers that record token ids: open-instruct, slime, prime-rl's traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.dcp_files import MaliciousPickle
from helpers.rollout_writers import EOS, PROMPT, SAMPLED, TOKENIZER, TOOL, ids
from helpers.trainer_writers import episode, open_instruct_record, slime_sample, write_lines, write_slime

from fx_influence.interop.rollouts.read import read_rollouts
from fx_influence.interop.rollouts.record import Rollout


def test_open_instruct_values_are_those_written(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "run_rollouts_000000.jsonl", *(open_instruct_record(i) for i in range(3)))
    rollouts = read_rollouts(path, TOKENIZER)
    assert rollouts[1] == Rollout(
        id="4/1",
        prompt_id="0",
        group=0,
        prompt="1+1=",
        completion="2",
        prompt_ids=PROMPT,
        completion_ids=SAMPLED,
        finished=True,
        behaviour_logprobs=(-0.5, -0.25),
        reward=10.0,
        advantage=0.5,
        source="gsm8k",
    )
    assert [(r.group, r.finished, r.advantage) for r in rollouts] == [(0, False, -0.5), (0, True, 0.5), (1, True, 1.5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"request_info": {"tool_calleds": True}}, "says that a tool was called"),
        ({"response_tokens": [5, 2**63]}, r"field 'response_tokens' holds 9223372036854775808; expected token"),
        ({"response_tokens": [5, -1]}, "holds -1; expected token ids"),
        ({"logprobs": [-0.5]}, "behaviour_logprobs of rollout '4/0' has 1 values; expected 2"),
        ({"advantage": float("nan")}, "'advantage' holds the number NaN"),
        ({"reward": "1"}, "field 'reward' is '1'; expected a number"),
    ],
)
def test_open_instruct_refuses_by_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", open_instruct_record(1), open_instruct_record(0, **changes))
    with pytest.raises(ValueError, match=rf"r\.jsonl, line 2: .*{message}"):
        read_rollouts(path, TOKENIZER)


def test_slime_values_are_those_written(tmp_path: Path) -> None:
    samples = [
        slime_sample(0),
        slime_sample(1, status="truncated", loss_mask=None),
        slime_sample(2, remove_sample=True, rollout_log_probs=None),
    ]
    rollouts = read_rollouts(write_slime(tmp_path / "3.pt", samples), TOKENIZER, scale=False)
    assert rollouts[0] == Rollout(
        id="3/0",
        prompt_id="0",
        group=0,
        prompt="1+1=",
        completion="2[9]2",
        prompt_ids=PROMPT,
        completion_ids=(*SAMPLED, *TOOL, *SAMPLED),
        finished=True,
        behaviour_logprobs=(-0.5,) * 7,
        reward=0.0,
        advantage=-0.5,
        completion_mask=(True, True, False, False, False, True, True),
        approximate=True,
        source="dapo",
    )
    assert [(r.group, r.advantage, r.finished) for r in rollouts] == [(0, -0.5, True), (0, 0.5, False), (1, 0.0, True)]
    assert (rollouts[1].completion_mask, rollouts[2].completion_mask) == (None, (False,) * 7)
    assert rollouts[2].behaviour_logprobs is None


def test_slime_rewards_of_several_keys_are_weighted(tmp_path: Path) -> None:
    path = write_slime(tmp_path / "3.pt", [slime_sample(0, reward={"acc": 1.0, "fmt": 0.5})])
    assert read_rollouts(path, reward_weights={"acc": 2.0, "fmt": 1.0})[0].reward == 2.5
    with pytest.raises(ValueError, match=r"3\.pt, sample 0: .*'reward' has the keys \['acc', 'fmt'\]"):
        read_rollouts(path)


def test_slime_file_runs_nothing(tmp_path: Path) -> None:
    path = write_slime(tmp_path / "3.pt", [slime_sample(0, metadata=MaliciousPickle(tmp_path / "made"))])
    with pytest.raises(Exception, match=r"3\.pt|Inert|mkdir|get"):
        read_rollouts(path)
    assert not (tmp_path / "made").exists()


def test_traces_have_one_rollout_a_leaf(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "traces.jsonl", episode("a"), episode("b", group=None))
    rollouts = read_rollouts(path, TOKENIZER)
    assert [(r.id, r.group, r.reward, r.source) for r in rollouts] == [
        ("a/0", 0, 2.5, "sums-v1"),
        ("a/1", 0, 2.5, "sums-v1"),
        ("b/0", 1, 2.5, "sums-v1"),
        ("b/1", 1, 2.5, "sums-v1"),
    ]
    assert rollouts[1].prompt_ids == (*PROMPT, 7)
    assert rollouts[1].completion_ids == (*SAMPLED, *TOOL, *ids("4"), EOS)
    assert rollouts[1].completion_mask == (True, True, False, False, False, True, True)
    assert rollouts[1].behaviour_logprobs == (-0.5, -0.25, 0.0, 0.0, 0.0, -1.0, -2.0)
    assert {r.advantage for r in rollouts} == {0.5}
    assert not any(r.approximate for r in rollouts)


def test_traces_without_advantages_or_episode(tmp_path: Path) -> None:
    trace = episode("a")["traces"][0]
    for node in trace["nodes"]:
        node.pop("advantages", None)
    assert [r.advantage for r in read_rollouts(write_lines(tmp_path / "traces.jsonl", trace))] == [None, None]


@pytest.mark.parametrize(
    ("node", "changes", "message"),
    [
        (1, {"token_ids": []}, "a sampled node has no token_ids, as from an API"),
        (1, {"mask": [True]}, "'mask' of a node has 1 values; expected 3"),
        (1, {"logprobs": [-0.5]}, "'logprobs' of a node has 1 values; expected 2"),
        (3, {"advantages": [0.5, 0.25]}, "'advantages' differs between the sampled tokens"),
        (0, {"parent": 4}, "'parent' of node"),
    ],
)
def test_traces_refuse_by_line(node: int, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    bad = episode("b")
    bad["traces"][0]["nodes"][node] |= changes
    path = write_lines(tmp_path / "traces.jsonl", episode("a"), bad)
    with pytest.raises(ValueError, match=rf"traces\.jsonl, line 2: .*{message}"):
        read_rollouts(path)
