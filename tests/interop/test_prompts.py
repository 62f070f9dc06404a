"""Prompt files: every format, and each way in which one can be wrong; conversations from them and from texts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from fx_influence.interop.prompts import Prompt, as_conversations, make_prompts, read_prompts

WORKED = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 1,200 + 48 = <<1200+48=1248>>1,248.\n#### 1,248"
GSM8K = [{"question": "How many clips?", "answer": WORKED}, {"question": "And now?", "answer": "It fell.\n#### -5"}]
ASKED = [{"role": "user", "content": "1+1?"}]
TALK = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "?"}]


def write_rows(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_read_prompts_jsonl_has_ids_and_columns(tmp_path: Path) -> None:
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


def test_read_prompts_txt_has_one_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffTell me \r\n\n  {not json\u2028}\n".encode())
    assert read_prompts(str(path)) == [Prompt("0", "Tell me "), Prompt("1", "  {not json\u2028}")]


def test_read_prompts_parquet_rows_are_records(tmp_path: Path) -> None:
    records = [{"id": "a", "prompt": "1+1=", "answer": 2}, {"id": "b", "prompt": "x\n=", "answer": 3}]
    assert read_prompts(write_rows(tmp_path / "p.parquet", records)) == [
        Prompt("a", "1+1=", {"answer": 2}),
        Prompt("b", "x\n=", {"answer": 3}),
    ]


@pytest.mark.parametrize("name", ["p.parquet", "p.jsonl"])
def test_read_prompts_splits_gsm8k_answer_and_solution(tmp_path: Path, name: str) -> None:
    assert read_prompts(write_rows(tmp_path / name, GSM8K)) == [
        Prompt("0", "How many clips?", {"answer": "1248", "solution": WORKED}),
        Prompt("1", "And now?", {"answer": "-5", "solution": "It fell.\n#### -5"}),
    ]


@pytest.mark.parametrize("gold", ["1,234,567", "$12", "1,5", "0.5"])
def test_gsm8k_answer_loses_only_thousands_separators(gold: str) -> None:
    (prompt,) = make_prompts([{"question": "?", "answer": f"#### 7\n####  {gold} ", "solution": "its own"}])
    assert prompt.columns == {"answer": {"1,234,567": "1234567"}.get(gold, gold), "solution": "its own"}


@pytest.mark.parametrize("name", ["p.parquet", "p.jsonl"])
@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_read_prompts_takes_messages_as_conversation(tmp_path: Path, name: str, field: str) -> None:
    """Every message has a ``name``, most of them None."""
    signed = [{**ASKED[0], "name": "Ann"}]
    path = write_rows(tmp_path / name, [{field: TALK, "answer": 1}, {field: signed, "answer": 2}])
    assert read_prompts(path) == [
        Prompt("0", "", {"answer": 1}, tuple(TALK)),
        Prompt("1", "", {"answer": 2}, (*signed,)),
    ]


def test_read_prompts_uses_first_prompt_field(tmp_path: Path) -> None:
    """An absent field of a parquet file is None."""
    records: list[dict[str, Any]] = [
        {"prompt": "a", "messages": TALK, **GSM8K[0]},
        {"prompt": None, "messages": None, **GSM8K[1]},
    ]
    first, second = read_prompts(write_rows(tmp_path / "p.parquet", records))
    assert first == Prompt("0", "a", {"messages": TALK, **GSM8K[0]})
    assert (second.text, second.messages, second.columns["answer"]) == ("And now?", None, "-5")


def test_read_prompts_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "p.parquet", GSM8K)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"^reading parquet needs pyarrow: pip install 'fx-influence\[parquet\]'$"):
        read_prompts(path)


def test_as_conversations_adds_user_and_system_messages() -> None:
    talk = Prompt("b", "", {"answer": "2"}, tuple(TALK))
    conversations = as_conversations([Prompt("a", "1+1?", {"answer": "2"}), talk], chat=True, system=None)
    assert conversations == [Prompt("a", "", {"answer": "2"}, tuple(ASKED)), talk]
    told = as_conversations([Prompt("a", "1+1?"), talk], chat=True, system="")
    assert [prompt.messages for prompt in told] == [
        ({"role": "system", "content": ""}, *ASKED),
        ({"role": "system", "content": ""}, *TALK),
    ]
    plain = [Prompt("a", "1+1?")]
    assert as_conversations(plain, chat=False, system=None) == plain


@pytest.mark.parametrize(
    ("prompts", "system", "message"),
    [
        (
            [Prompt("a", "1+1?")],
            "Be brief.",
            "system is 'Be brief.' and prompt 'a' a plain text; expected a conversation. Set chat: true",
        ),
        (
            [Prompt("a", "", {}, ({"role": "system", "content": "s"}, *ASKED))],
            "Be brief.",
            "prompt 'a' begins with a system message of its own; expected one",
        ),
        ([Prompt("a", "1+1?"), Prompt("b", "", {}, (*ASKED,))], None, "'b' and prompt 'a' .* Set chat: true"),
    ],
)
def test_as_conversations_names_invalid_prompt(prompts: list[Prompt], system: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_conversations(prompts, chat=False, system=system)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"", "holds no prompt"),
        ("p.parquet", b"PAR1", "cannot be read as parquet"),
        ("p.txt", b"\n  \n", "holds no prompt"),
        ("p.csv", b"prompt\n", "ends in '.csv'"),
        ("p.txt", b"\xff\xfe", "is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": ', "line 3 is not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n"b"', "line 2 holds str"),
        (
            "p.jsonl",
            b'{"text": "a", "answer": 1}',
            r"line 1 has no \"prompt\", \"messages\" or \"question\" .it has \['answer', 'text'\]",
        ),
        ("p.jsonl", b'{"question": "a", "answer": 1}', 'line 1: "answer" is 1; expected .*Write "prompt" for'),
        ("p.jsonl", b'{"question": "a", "answer": "72"}', "line 1: \"answer\" is '72'; expected an end"),
        ("p.jsonl", b'{"question": "a", "answer": "72 ####"}', "line 1: \"answer\" is '72 ####'; expected an end"),
        (
            "p.jsonl",
            b'{"question": ["a"], "answer": "#### 1"}',
            r"line 1: \"question\" is \['a'\]; expected a non-empty text",
        ),
        ("p.jsonl", b'{"messages": "a"}', "line 1: \"messages\" is 'a'; expected a list of messages"),
        ("p.jsonl", b'{"prompt": []}', 'line 1: "prompt" is empty; expected a last message'),
        ("p.jsonl", b'{"prompt": [{"role": "user"}]}', 'line 1: message 0 of "prompt" is .*"content"'),
        ("p.jsonl", b'{"prompt": ["a"]}', "line 1: message 0 of \"prompt\" is 'a'"),
        (
            "p.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            'line 1: "messages" ends with the assistant; expected a last message that the policy is to answer',
        ),
        ("p.jsonl", b'{"prompt": ""}', "line 1: \"prompt\" is ''"),
        ("p.jsonl", b'{"prompt": "a", "id": null}', 'line 1: "id" is None'),
        ("p.jsonl", b'{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', "line 2: id 'x' is already .* line 1"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "id": 0}', "line 2: id '0' is already .* line 1"),
    ],
)
def test_read_prompts_names_line_and_remedy_of_bad_file(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert name in str(caught.value)


def test_read_prompts_names_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.txt' does not exist"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of git-lfs.* Run git lfs pull"),
        (b"<!DOCTYPE html><title>Not found</title>", "an HTML or XML page.* Download it again"),
    ],
)
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.parquet"])
def test_read_prompts_names_what_stands_in_for_a_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged: {message}"):
        read_prompts(file)
