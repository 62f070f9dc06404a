"""Rollouts of TRL: texts and conversations tokenised again, rewards from columns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.rollout_writers import (
    BOS,
    EOS,
    PROMPT,
    SAMPLED,
    TOKENIZER,
    ids,
    make_tokenizer,
    write_trl,
)

from fx_influence.interop.rollouts.read import read_rollouts
from fx_influence.interop.rollouts.record import Rollout


def test_trl_keeps_recorded_advantage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_trl(
        tmp_path,
        monkeypatch,
        prompt=["1+1=", "3=", "1+1="],
        completion=["2", "3", ""],
        rewards={"exact": [1.0, float("nan"), 0.0]},
        extra={"source": ["a", "b", "c"]},
        advantages=[0.7, 0.0, -0.7],
    )
    rollouts = read_rollouts(path, TOKENIZER)
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
        advantage=0.7,
        approximate=True,
        source="a",
    )
    assert [(r.group, r.completion_ids, r.reward, r.source) for r in rollouts[1:]] == [
        (1, (*ids("3"), EOS), None, "b"),
        (0, (EOS,), 0.0, "c"),
    ]


def chat(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def call(name: str, **arguments: int) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def test_trl_renders_conversation_by_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_trl(
        tmp_path,
        monkeypatch,
        prompt=[[chat("user", "1+1?")], [chat("system", "sum"), chat("user", "2?")]],
        completion=[[chat("assistant", " 2")], [chat("assistant", "2")]],
        rewards={"exact": [1.0, 0.0]},
        advantages=[0.7, -0.7],
    )
    first, second = read_rollouts(path, TOKENIZER)
    assert first.prompt == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert first.prompt_ids == ids(first.prompt)
    assert (first.completion, first.completion_ids) == (" 2", (*ids(" 2"), EOS))
    assert second.prompt.startswith("<|im_start|>system\nsum<|im_end|>\n<|im_start|>user")
    opened = read_rollouts(path, TOKENIZER, chat_template_kwargs={"opening": "<think>"})
    assert opened[0].prompt == first.prompt + "<think>"


def test_trl_masks_output_of_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [call("add", x=1), chat("tool", "2"), chat("assistant", "two")]
    # In the file's columns, every call has the arguments of all, null where it had none.
    other = [call("neg", y=2)]
    path = write_trl(
        tmp_path,
        monkeypatch,
        prompt=[[chat("user", "1+1?")]] * 4,
        completion=[turns, turns[:2], other, [chat("assistant", "2")]],
        rewards={"exact": [1.0, 0.0, 0.0, 0.0]},
        advantages=[0.5, 0.0, 0.0, -0.5],
    )
    complete, stopped, single, plain = read_rollouts(path, TOKENIZER)
    request, answer = (*ids("[add{'x': 1}]"), EOS), (*ids("two"), EOS)
    between = ids("\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n")
    assert complete.completion_ids == (*request, *between, *answer)
    assert complete.completion_mask == (True,) * len(request) + (False,) * len(between) + (True,) * len(answer)
    assert (complete.finished, stopped.finished) == (True, False)
    assert complete.completion == "[add{'x': 1}]\ntool\n2\nassistant\ntwo"
    left = ids("\n<|im_start|>tool\n2<|im_end|>\n")
    assert stopped.completion_ids == (*request, *left)
    assert stopped.completion_mask == (True,) * len(request) + (False,) * len(left)
    assert (single.completion, single.finished) == ("[neg{'y': 2}]", True)
    assert (single.completion_mask, plain.completion_mask) == (None, None)


def test_trl_refuses_template_that_rewrites_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [chat("assistant", "1"), chat("tool", "2"), chat("assistant", "two")]
    columns: dict[str, Any] = {
        "prompt": [[chat("user", "1+1?")]],
        "completion": [turns],
        "rewards": {},
        "advantages": [0.5],
    }
    path = write_trl(tmp_path, monkeypatch, **columns)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(ValueError, match="row 0: the tokenizer's chat template rewrites earlier turns"):
        read_rollouts(path, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no tools') }}"
    with pytest.raises(ValueError, match=r"row 0: the tokenizer's chat template fails on the messages \(no tools"):
        read_rollouts(path, tokenizer)


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ([chat("user", "?")], [{"content": "2"}], "field 'completion' is .*a list of messages with a role"),
        ([{"role": "user", "content": [{"type": "image"}]}], [chat("assistant", "2")], "'prompt' holds something else"),
        ("1+1=", [call("add", x=1)], "messages and the prompt a text"),
    ],
)
def test_trl_refuses_messages_without_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: Any, completion: Any, message: str
) -> None:
    path = write_trl(tmp_path, monkeypatch, prompt=[prompt], completion=[completion], advantages=[0.0])
    with pytest.raises(ValueError, match=f"row 0: .*{message}"):
        read_rollouts(path, TOKENIZER)


def test_trl_rewards_add_up_by_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_trl(
        tmp_path,
        monkeypatch,
        prompt=["1+1="] * 2,
        completion=["2"] * 2,
        rewards={"exact": [1.0, float("nan")], "format": [0.5, 0.25]},
        extra={"length": [1, 1]},
        advantages=[0.5, -0.5],
    )
    assert [r.reward for r in read_rollouts(path, TOKENIZER)] == [None, None]
    assert [r.reward for r in read_rollouts(path, TOKENIZER, reward_weights={"exact": 2.0, "format": 4.0})] == [
        4.0,
        1.0,
    ]
    with pytest.raises(ValueError, match=r"reward_weights has \['exakt'\]; .*\['exact', 'format', 'length'\]"):
        read_rollouts(path, TOKENIZER, reward_weights={"exakt": 1.0})


def test_trl_refuses_rows_with_not_finite_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_trl(
        tmp_path,
        monkeypatch,
        prompt=["1+1="] * 3,
        completion=["2"] * 3,
        rewards={"exact": [1.0, float("inf"), 0.0]},
        advantages=[0.5, -0.5, float("nan")],
    )
    with pytest.raises(ValueError, match="column 'exact' holds inf") as caught:
        read_rollouts(path, TOKENIZER)
    assert [line.partition(": ")[0][-5:] for line in str(caught.value).splitlines()] == ["row 1", "row 2"]
    assert "field 'advantage' is None; expected a number; pandas writes NaN as null" in str(caught.value)


def test_trl_refuses_other_parquet_or_no_parquet(tmp_path: Path) -> None:
    import pandas

    path = tmp_path / "other.parquet"
    pandas.DataFrame({"prompt": ["1"], "reward": [1.0]}).to_parquet(path)
    with pytest.raises(ValueError, match=r"columns \['prompt', 'reward'\]; .*missing: \['step', 'completion', 'adv"):
        read_rollouts(path, TOKENIZER)
    path.write_text("no parquet")
    with pytest.raises(ValueError, match=r"other\.parquet' is not parquet"):
        read_rollouts(path, TOKENIZER)


def test_trl_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "completions_00010.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"^reading parquet needs pyarrow: pip install 'fx-influence\[parquet\]'$"):
        read_rollouts(tmp_path / "completions_00010.parquet", TOKENIZER)
