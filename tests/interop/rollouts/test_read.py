"""``read_rollouts``: detection of the format, and errors that every format shares."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.rollout_writers import (
    PROMPT,
    SAMPLED,
    TOKENIZER,
    prime_record,
    write_prime_rl,
)

from fx_influence.interop.rollouts.native_format import write_rollouts
from fx_influence.interop.rollouts.read import read_rollouts
from fx_influence.interop.rollouts.record import Rollout


def native_rollout() -> Rollout:
    return Rollout("p/0", "p", 0, "1+1=", "2", PROMPT, SAMPLED, True, (-0.5, -0.25))


def test_native_format_is_detected(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "r.jsonl", [native_rollout()])
    assert read_rollouts(tmp_path / "r.jsonl") == [native_rollout()]


def test_format_argument_overrides_suffix(tmp_path: Path) -> None:
    path = write_prime_rl(tmp_path / "export.log", [prime_record()])
    with pytest.raises(
        ValueError,
        match=r"export.log' ends in '.log'; expected .jsonl, .json, .parquet or .pt. Give its format with format=",
    ):
        read_rollouts(path)
    assert len(read_rollouts(path, format="prime_rl")) == 1
    with pytest.raises(ValueError, match="no field 'input_lengths'"):
        read_rollouts(path, format="nemo_rl")
    with pytest.raises(ValueError, match=r"format is 'axolotl'; expected one of fx_influence, prime_rl, .*, trl"):
        read_rollouts(path, format="axolotl")  # type: ignore[arg-type]


def test_unknown_format_is_refused_with_fields(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"trace_id": "x", "spans": []}\n')
    with pytest.raises(ValueError, match=r"first record has \['spans', 'trace_id'\]; expected .* verl: input, output"):
        read_rollouts(tmp_path / "t.jsonl")


def test_read_rollouts_names_and_counts_malformed_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    good = json.dumps(prime_record())
    bad = [
        good[:-1],
        "[1]",
        json.dumps(prime_record(advantages=[float("nan")] * 11)),
        good.replace("-0.25", "1e999"),
        "[" * 100_000,
        b"\xff{}".decode("latin-1"),
    ]
    path.write_text("\n".join([good, "", *bad]), encoding="latin-1")
    with pytest.raises(ValueError, match="line 3: this is not JSON") as caught:
        read_rollouts(path)
    lines = str(caught.value).splitlines()
    assert [line.split(", line ")[1].partition(":")[0] for line in lines] == ["3", "4", "5", "6", "7", "8"]
    assert "holds the number NaN" in lines[2]
    assert "holds the number 1e999" in lines[3]
    assert "not UTF-8" in lines[5]

    path.write_text("\n".join([good] + ["{"] * 13))
    with pytest.raises(ValueError, match="line 2: this is not JSON") as caught:
        read_rollouts(path)
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-1]) == (11, "and 3 more, 13 in all")


def test_read_rollouts_names_lines_of_file_without_object(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("\nno json\n")
    with pytest.raises(ValueError, match=r"r.jsonl, line 2: this is not JSON"):
        read_rollouts(tmp_path / "r.jsonl")


@pytest.mark.parametrize("format", [None, "prime_rl", "nemo_rl", "verl"])
def test_read_rollouts_refuses_file_without_rollouts(tmp_path: Path, format: Any) -> None:
    (tmp_path / "r.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"r.jsonl' holds no rollout"):
        read_rollouts(tmp_path / "r.jsonl", TOKENIZER, format=format)


def test_read_rollouts_refuses_repeated_ids(tmp_path: Path) -> None:
    path = write_prime_rl(tmp_path / "r.jsonl", [prime_record(0), prime_record(1), prime_record(0)])
    with pytest.raises(ValueError, match="gives 1 ids to more than one rollout: 7/1/0; expected unique ids"):
        read_rollouts(path)
    write_rollouts(tmp_path / "own.jsonl", [native_rollout(), dataclasses.replace(native_rollout(), group=1)])
    with pytest.raises(ValueError, match="more than one rollout: p/0"):
        read_rollouts(tmp_path / "own.jsonl")


def test_read_rollouts_names_missing_file_or_ranks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'.*none.jsonl' does not exist"):
        read_rollouts(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="or a directory of rank"):
        read_rollouts(tmp_path)
