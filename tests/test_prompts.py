"""Prompt files: both formats, and each way in which one can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from fx_influence.interop.prompts import Prompt, read_prompts


def test_jsonl_gives_ids_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"id": "a", "prompt": "1+1=", "answer": "2", "level": {"n": 1}}\n\n'
        '{"prompt": "x\u2028y"}\n{"id": 7, "prompt": "z"}'
    )
    assert read_prompts(path) == [
        Prompt("a", "1+1=", {"answer": "2", "level": {"n": 1}}),
        Prompt("1", "x\u2028y", {}),
        Prompt("7", "z", {}),
    ]


def test_txt_gives_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffTell me \r\n\n  {not json\u2028}\n".encode())
    assert read_prompts(str(path)) == [Prompt("0", "Tell me "), Prompt("1", "  {not json\u2028}")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"", "holds no prompt"),
        ("p.txt", b"\n  \n", "holds no prompt"),
        ("p.csv", b"prompt\n", "ends in '.csv'"),
        ("p.txt", b"\xff\xfe", "is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": ', "line 3 is not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n"b"', "line 2 holds str"),
        (
            "p.jsonl",
            b'{"question": "a", "answer": 1}',
            r"line 1 has no field \"prompt\" .it has \['answer', 'question'\]",
        ),
        ("p.jsonl", b'{"prompt": [{"role": "user"}]}', 'line 1: "prompt" is .*chat template'),
        ("p.jsonl", b'{"prompt": ""}', "line 1: \"prompt\" is ''"),
        ("p.jsonl", b'{"prompt": "a", "id": null}', 'line 1: "id" is None'),
        ("p.jsonl", b'{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', "line 2: id 'x' is already .* line 1"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "id": 0}', "line 2: id '0' is already .* line 1"),
    ],
)
def test_a_bad_file_is_named_with_line_and_remedy(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert name in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.txt' does not exist"):
        read_prompts(tmp_path / "none.txt")
