"""Rollout files of this library: reading returns what was written, and errors name the line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.made_rollouts import rollout

from fx_influence.interop.rollouts.native_format import read_native_rollouts, write_rollouts


def test_native_file_round_trips_every_bit(tmp_path: Path) -> None:
    awkward = (-1 / 3, -math.nextafter(0.1, 1.0))
    written = [
        rollout(behaviour_logprobs=awkward, reward=0.1 + 0.2, advantage=-1e-300),
        rollout("ü/\u2028", completion='line\nbreak \u2028 "quote" \ud800 \x00', finished=False, source="<b>\n"),
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
        (altered(source=5), "field 'source' is 5"),
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
        "line 3: field 'reward' holds the number NaN; expected a finite one. Repair it first",
        "line 4: field 'group' is '0'; expected the type that write_rollouts gives it",
    ]


def test_read_native_names_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'.*none.jsonl' does not exist"):
        read_native_rollouts(tmp_path / "none.jsonl")
