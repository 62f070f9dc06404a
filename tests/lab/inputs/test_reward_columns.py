"""Prompts without a column that the reward needs are refused or warned of before anything is sampled."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import pytest

from fx_influence.interop.rewards import exact_match, math_verify
from fx_influence.interop.scoring import check_columns
from fx_influence.lab.inputs.rollouts import load_state
from fx_influence.lab.plan import EntropyInfluencePlan, SampledBatch, resolved

HALF: dict[str, dict[str, Any]] = {"a": {"answer": "2"}, "b": {"answer": None}, "c": {}}


def needs_gold(
    prompts: list[str], completions: list[str], gold: list[str], level: int = 0, **columns: Any
) -> list[float]:
    """Give a reward that needs ``gold``."""
    raise AssertionError("called before there is anything to judge")


def test_check_columns_rejects_column_missing_in_all() -> None:
    with pytest.raises(
        ValueError, match=r"gold is missing in 3 of 3 prompts, the first of them 'a'; .*:needs_gold needs it"
    ):
        check_columns(needs_gold, HALF)
    nothing: dict[str, dict[str, Any]] = {"a": {"answer": None}}
    with pytest.raises(ValueError, match="answer is missing in 1 of 1 prompts"):
        check_columns(exact_match, nothing)


def test_check_columns_warns_of_column_missing_in_some(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_columns(exact_match, HALF)
    [record] = caplog.records
    assert record.getMessage().startswith("answer is missing in 2 of 3 prompts, the first of them 'b'; expected it")


def test_check_columns_ignores_optional_columns(caplog: pytest.LogCaptureFixture) -> None:
    @functools.wraps(needs_gold)
    def wrapper(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return needs_gold(prompts, completions, gold=["2"], **columns)

    for reward in (math_verify, wrapper, lambda completions, **columns: [0.0]):
        check_columns(reward, {"a": {}, "b": {}})
    assert not caplog.records


def test_load_state_rejects_null_column_before_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fx_influence.lab.inputs.training_state.load_checkpoint", lambda *_, **__: pytest.fail("the model was read")
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "answer": null}\n')
    plan = EntropyInfluencePlan(update=SampledBatch("p.jsonl"))
    with pytest.raises(ValueError, match="answer is missing in 1 of 1 prompts, the first of them '0'"):
        load_state(resolved(plan, tmp_path))
