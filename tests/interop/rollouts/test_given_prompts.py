"""verl's files with the original prompts: exact prompts, masked turns, sources and extra information."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.rollout_writers import EOS, TOKENIZER, ids, write_verl

from fx_influence.interop.rollouts.native_format import write_rollouts
from fx_influence.interop.rollouts.read import read_rollouts

PROMPTS: list[list[dict[str, str]]] = [[{"role": "user", "content": text}] for text in ("1+1=", "3=")]


def rendered(messages: list[dict[str, str]]) -> str:
    return str(TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def tokens(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def bare(text: str) -> str:
    """Return the text as verl's batch_decode with skip_special_tokens gives it."""
    return str(TOKENIZER.batch_decode([list(tokens(text))], skip_special_tokens=True)[0])


def record(tmp_path: Path, *texts: str, **columns: Any) -> Path:
    """Write verl's file of completions to the first prompt, as texts of the chat template."""
    n = len(texts)
    inputs, outputs = [bare(rendered(PROMPTS[0]))] * n, [bare(text) for text in texts]
    batch: dict[str, Any] = {"input": inputs, "output": outputs, "score": [1.0] * n}
    return write_verl(tmp_path / "5.jsonl", {**batch, **columns})


def test_prompts_give_back_markers(tmp_path: Path) -> None:
    path = record(tmp_path, "2<|im_end|>")
    without, given = read_rollouts(path, TOKENIZER)[0], read_rollouts(path, TOKENIZER, prompts=PROMPTS)[0]
    assert (given.prompt_ids, given.prompt) == (tokens(rendered(PROMPTS[0])), rendered(PROMPTS[0]))
    assert given.prompt_ids != without.prompt_ids
    assert (given.completion_ids, given.finished, given.completion_mask) == ((*ids("2"), EOS), True, None)


@pytest.mark.parametrize("role", ["tool", "user"])
def test_turns_of_others_are_masked(role: str, tmp_path: Path) -> None:
    """The tokens and the mask are those of a training with the chat template, which verl's file has lost."""
    turns = [("2<|im_end|>", True), (f"\n<|im_start|>{role}\n[9]<|im_end|>\n<|im_start|>assistant\n", False)]
    turns = [*turns, *turns, ("3<|im_end|>", True)]
    rollout = read_rollouts(record(tmp_path, "".join(text for text, _ in turns)), TOKENIZER, prompts=PROMPTS)[0]
    expected = [(token, sampled) for text, sampled in turns for token in tokens(text)]
    assert rollout.completion_ids == tuple(token for token, _ in expected)
    assert rollout.completion_mask == tuple(sampled for _, sampled in expected)


def test_rows_of_the_data_set_name_sources(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "data_source": f"s{i}"} for i, prompt in enumerate(PROMPTS)]
    path = record(tmp_path, "2<|im_end|>", "3<|im_end|>", acc=[True, 0.5], pred=["2", None], data_source=["own", None])
    rollouts = read_rollouts(path, TOKENIZER, prompts=rows)
    assert [r.source for r in rollouts] == ["own", "s0"]
    assert [r.extras for r in rollouts] == [{"acc": True, "pred": "2", "data_source": "own"}, {"acc": 0.5}]
    write_rollouts(tmp_path / "own.jsonl", rollouts)
    assert read_rollouts(tmp_path / "own.jsonl") == rollouts


def test_prompts_must_have_the_recorded_one(tmp_path: Path) -> None:
    path = record(tmp_path, "2<|im_end|>")
    with pytest.raises(ValueError, match=r"line 1: field 'input' is .*, of 0 of the 1 prompts; expected one of them"):
        read_rollouts(path, TOKENIZER, prompts=PROMPTS[1:])
    assert read_rollouts(path, TOKENIZER, prompts=[*PROMPTS, PROMPTS[0]])[0].prompt_ids
    with pytest.raises(ValueError, match="prompts holds 7; expected texts, lists of messages, or rows"):
        read_rollouts(path, TOKENIZER, prompts=[7])
    write_rollouts(tmp_path / "own.jsonl", read_rollouts(path, TOKENIZER))
    with pytest.raises(ValueError, match="prompts is given for fx_influence; expected None"):
        read_rollouts(tmp_path / "own.jsonl", TOKENIZER, prompts=PROMPTS)
