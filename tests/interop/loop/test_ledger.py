"""The ledger that ``fx.attach`` writes: the steps of ``history``, rollouts as the loop names them, and its faults."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.loops import COMPLETIONS, COUNT, PROMPT, PROMPTS, Loop, Rollouts, named, sample_rollouts
from torch import Tensor

import fx_influence as fx
from fx_influence.interop.ledger.file import LEDGER, read_ledger
from fx_influence.interop.loop import ledger
from fx_influence.lab.cli import main

REWARDS = torch.arange(COUNT).double() % 2


def with_rewards(rollouts: Rollouts, logprobs: Tensor, _: Tensor) -> dict[str, Any]:
    sources = ["easy" if i % 2 else None for i in range(COUNT)]
    return {**named(rollouts, logprobs), "rewards": REWARDS, "sources": sources}


def measured(directory: Path, steps: int = 2, **options: Any) -> fx.interop.StepCapture:
    capture = Loop(steps=steps, options={"every": 1, "directory": directory, **options}, add=with_rewards).run()
    assert capture is not None
    return capture


def test_ledger_has_the_steps_of_the_history(tmp_path: Path) -> None:
    influences: list[fx.Influence] = []
    capture = measured(tmp_path, on_step=lambda _, out: influences.append(out))
    entries = read_ledger(tmp_path)
    assert [entry["step"] for entry in entries] == [1, 2]
    for entry, step, out in zip(entries, capture.history, influences, strict=True):
        figures = entry["figures"]
        for name in ("total", "measured", "momentum", "entropy", "lr", "residual"):
            assert figures[name] == step[name]
        assert figures["reward"] == float(REWARDS.mean())
        assert "truncated" not in figures, "a model without a config names no end of sequence"
        assert list(entry["sums"]) == [
            *("region", "third", "band", "advantage", "reward", "reward value", "difficulty", "source")
        ]
        sums = {label: value for label, value, *_ in entry["sums"]["source"]}
        mask = torch.arange(COUNT) % 2 == 1
        expected = out.sums(mask).influence * step["lr"]
        assert sums == {"unknown": float(expected[0]), "easy": float(expected[1])}
        assert len(entry["prompts"]) == PROMPTS
        assert {row[3] for row in entry["prompts"]} == {COMPLETIONS}
    training = fx.load_training(tmp_path)
    assert training.settings == {"preconditioner": "frozen", "normalize": "token"}


def test_rollouts_have_the_loops_tokens_and_texts(tmp_path: Path) -> None:
    measured(tmp_path, 1, decode=lambda tokens: "".join(chr(97 + t) for t in tokens))
    measured(tmp_path / "numbers", 1)
    rollouts = sample_rollouts(Loop().model, 0)
    texts = set()
    for ids, mask in zip(rollouts.input_ids, rollouts.attention_mask, strict=True):
        prompt, completion = ids[:PROMPT].tolist(), ids[PROMPT:][mask[PROMPT:]].tolist()
        texts.add(tuple("".join(chr(97 + t) for t in tokens) for tokens in (prompt, completion)))
    [entry], [plain] = read_ledger(tmp_path), read_ledger(tmp_path / "numbers")
    assert {(x["prompt"], x["completion"]) for x in entry["strongest"]} <= texts
    assert {row[5] for row in entry["prompts"]} == {prompt for prompt, _ in texts}
    for x, y in zip(entry["strongest"], plain["strongest"], strict=True):
        assert y["completion"] == " ".join(str(ord(c) - 97) for c in x["completion"])


def test_end_tokens_decide_what_is_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = sample_rollouts(Loop().model, 0)
    last = [ids[mask][-1].item() for ids, mask in zip(rollouts.input_ids, rollouts.attention_mask, strict=True)]
    end = int(last[0])
    monkeypatch.setattr(ledger, "end_tokens", lambda _: frozenset({end}))
    measured(tmp_path, 1)
    [entry] = read_ledger(tmp_path)
    assert entry["figures"]["truncated"] == sum(x != end for x in last) / COUNT
    assert "end" in entry["sums"]


def test_fault_of_writing_is_a_warning_and_changes_nothing(tmp_path: Path) -> None:
    plain = Loop(steps=3)
    plain.run()
    faulty = Loop(steps=3, options={"every": 1, "directory": tmp_path / "file"}, add=with_rewards)
    (tmp_path / "file").write_text("no directory")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        capture = faulty.run()
    assert capture is not None
    texts = [str(w.message) for w in caught]
    assert [text.startswith(f"step {k} is measured and not in the ledger: ") for k, text in enumerate(texts, 1)] == (
        [True] * 3
    )
    assert [step["step"] for step in capture.history] == [1, 2, 3]
    assert all(torch.equal(x, faulty.weights()[name]) for name, x in plain.weights().items())


def test_ledger_of_another_training_is_refused(tmp_path: Path) -> None:
    measured(tmp_path, 1)
    before = (tmp_path / LEDGER).read_bytes()
    with pytest.raises(ValueError, match="has the ledger of another training run; expected none"):
        measured(tmp_path, 1)
    assert (tmp_path / LEDGER).read_bytes() == before


def test_resumed_loop_appends_to_its_ledger(tmp_path: Path) -> None:
    first = Loop(steps=2, options={"every": 1, "directory": tmp_path}, add=with_rewards)
    first.run()
    resumed = Loop(steps=1, options={"every": 1, "directory": tmp_path}, add=with_rewards)
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    resumed.run()
    assert [entry["step"] for entry in read_ledger(tmp_path)] == [1, 2, 3]


@pytest.mark.slow
def test_page_of_a_loop_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured(tmp_path, 3)
    assert main(["report", os.fspath(tmp_path)]) == 0
    assert "The account" in capsys.readouterr().out
    assert "Prompts that return" not in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
