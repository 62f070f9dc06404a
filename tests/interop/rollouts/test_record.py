"""Rollouts: the masks of a collated batch, and files that give back what was written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.native_format import read_native_rollouts, write_rollouts
from fx_influence.interop.rollouts.record import Rollout

PAD = EOS = 1


def rollout(name: str = "p/0", **changes: Any) -> Rollout:
    fields: dict[str, Any] = {
        "id": name,
        "prompt_id": "p",
        "group": 0,
        "prompt": "1+1=",
        "completion": "2",
        "prompt_ids": (4, 9, 4),
        "completion_ids": (5, EOS),
        "finished": True,
        "behaviour_logprobs": (-0.5, -0.25),
    }
    return Rollout(**{**fields, **changes})


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


def test_rollout_refuses_logprobs_of_another_length() -> None:
    with pytest.raises(ValueError, match="behaviour_logprobs of rollout 'p/0' has 1 values for 2"):
        rollout(behaviour_logprobs=(-0.5,))


def test_native_file_round_trips_every_bit(tmp_path: Path) -> None:
    awkward = (-1 / 3, -math.nextafter(0.1, 1.0))
    written = [
        rollout(behaviour_logprobs=awkward, reward=0.1 + 0.2, advantage=-1e-300),
        rollout("ü/\u2028", completion='line\nbreak \u2028 "quote" \ud800 \x00', finished=False),
    ]
    path = tmp_path / "r.jsonl"
    write_rollouts(path, written)
    assert read_native_rollouts(path) == written
    assert len(path.read_bytes().splitlines()) == 2
    assert os.listdir(tmp_path) == ["r.jsonl"]


def test_write_rollouts_keeps_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    write_rollouts(path, [rollout()])
    with pytest.raises(ValueError, match="rollout 'bad/0' holds a number that is not finite"):
        write_rollouts(path, [rollout(), rollout("bad/0", reward=math.nan)])

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_rollouts(path, [rollout("new/0")])
    assert [r.id for r in read_native_rollouts(path)] == ["p/0"]
    assert os.listdir(tmp_path) == ["r.jsonl"]


def test_write_rollouts_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_rollouts(tmp_path / "r.jsonl", [rollout()])
    assert (tmp_path / "r.jsonl").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_read_native_skips_blank_lines_and_unknown_fields(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    record = {**dataclasses.asdict(rollout()), "note": "ignored"}
    path.write_text(f"\n{json.dumps(record)}\n\n")
    assert read_native_rollouts(path) == [rollout()]


def without(name: str) -> str:
    return json.dumps({key: value for key, value in dataclasses.asdict(rollout()).items() if key != name})


def altered(**changes: Any) -> str:
    return json.dumps({**dataclasses.asdict(rollout()), **changes})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": ', "is not JSON"),
        ("[1, 2]", "holds list"),
        (without("prompt_ids"), "no field 'prompt_ids'"),
        (altered(completion_ids="57"), "field 'completion_ids' is '57'"),
        (altered(prompt_ids=[1.5]), r"field 'prompt_ids' is \[1.5\]"),
        (altered(finished=1), "field 'finished' is 1"),
        (altered(group=True), "field 'group' is True"),
        (altered(reward="high"), "field 'reward' is 'high'"),
        (altered(behaviour_logprobs=[None, -1.0]), r"field 'behaviour_logprobs' is \[None"),
        (altered(behaviour_logprobs=[-1.0]), "behaviour_logprobs of rollout 'p/0' has 1 values"),
    ],
)
def test_read_native_names_malformed_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f"{json.dumps(dataclasses.asdict(rollout()))}\n\n{line}\n")
    with pytest.raises(ValueError, match=f"r.jsonl, line 3.*{message}"):
        read_native_rollouts(path)


def test_read_native_names_all_malformed_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join([altered(), "{", altered(reward=math.nan), altered(group="0"), altered()]))
    with pytest.raises(ValueError, match="line 2: this is not JSON") as caught:
        read_native_rollouts(path)
    assert [line.split("r.jsonl, ")[1] for line in str(caught.value).splitlines()][1:] == [
        "line 3: field 'reward' holds the number NaN, which is not finite; repair it first",
        "line 4: field 'group' is '0'; expected the type that write_rollouts gives it",
    ]


def test_read_native_names_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'.*none.jsonl' does not exist"):
        read_native_rollouts(tmp_path / "none.jsonl")


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


def test_collate_leaves_out_incomplete_coefficients() -> None:
    assert collate([rollout(coefficients=(1.0, 2.0)), rollout("q/0")], PAD).coefficients is None


@pytest.mark.parametrize("name", ["completion_mask", "coefficients", "entropy_coefficients"])
def test_rollout_refuses_per_token_value_of_another_length(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} of rollout 'p/0' has 1 values for 2"):
        rollout(**{name: (True,)})
