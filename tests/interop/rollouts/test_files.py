"""Compressed rollout files and directories of them."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.rollout_writers import TOKENIZER, write_verl
from helpers.trainer_writers import open_instruct_record, slime_sample, write_lines, write_slime

from fx_influence.interop.rollouts.read import read_rollouts

BATCH: dict[str, list[Any]] = {"input": ["1="] * 2, "output": ["1", "2"], "score": [1.0, 0.0]}


def test_gzip_file_reads_as_its_contents(tmp_path: Path) -> None:
    plain = write_lines(tmp_path / "r.jsonl", open_instruct_record(0), open_instruct_record(1))
    packed = tmp_path / "r.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_rollouts(packed, TOKENIZER) == read_rollouts(plain, TOKENIZER)
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"r\.jsonl\.gz is damaged \("):
        read_rollouts(packed, TOKENIZER)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet", ".pt"])
@pytest.mark.parametrize(
    ("contents", "cause"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs.* Run git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "an HTML or XML page.* Download it again"),
    ],
)
def test_file_in_place_of_rollouts_is_named(suffix: str, contents: bytes, cause: str, tmp_path: Path) -> None:
    (tmp_path / f"r{suffix}").write_bytes(contents)
    with pytest.raises(ValueError, match=rf"r{suffix} is damaged: {cause}"):
        read_rollouts(tmp_path / f"r{suffix}", TOKENIZER)


def test_zstandard_file_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "r.jsonl.zst").write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install zstandard; or decompress it first: zstd -d r\.jsonl\.zst"):
        read_rollouts(tmp_path / "r.jsonl.zst")


def test_zstandard_file_goes_through_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of zstandard's interface, whose compression is none, since the package may be missing."""

    class Decompressor:
        def stream_reader(self, raw: object, read_across_frames: bool) -> object:
            assert read_across_frames
            return raw

    package = ModuleType("zstandard")
    vars(package)["ZstdDecompressor"] = Decompressor
    monkeypatch.setitem(sys.modules, "zstandard", package)
    path = write_lines(tmp_path / "r.jsonl.zst", open_instruct_record(1))
    assert [r.id for r in read_rollouts(path)] == ["4/1"]


def test_directory_is_read_in_order_of_numbers(tmp_path: Path) -> None:
    for step in (9, 10):
        write_verl(tmp_path / f"{step}.jsonl", BATCH, step)
    rollouts = read_rollouts(tmp_path, TOKENIZER)
    assert [(r.id, r.group, r.advantage is not None) for r in rollouts] == [(str(i), i // 2, True) for i in range(4)]
    assert read_rollouts(tmp_path / "9.jsonl", TOKENIZER)[1] == rollouts[1]


def test_directory_of_several_formats_is_refused(tmp_path: Path) -> None:
    write_verl(tmp_path / "1.jsonl", BATCH)
    write_lines(tmp_path / "2.jsonl", open_instruct_record(0))
    with pytest.raises(ValueError, match="has files of the formats open_instruct, verl; expected one"):
        read_rollouts(tmp_path, TOKENIZER)
    write_slime(tmp_path / "3.pt", [slime_sample(0)])
    with pytest.raises(ValueError, match=r"has files that end in \.jsonl, \.pt; expected one kind"):
        read_rollouts(tmp_path, TOKENIZER)
