"""Rewards: the shipped one, finding the user's, and what is accepted from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fx_influence.interop.rewards import RewardError, exact_match, resolve_reward, score


def test_exact_match_reads_what_follows_the_last_equals_sign() -> None:
    completions = ["17+9=26", "26", " 26 ", "26=17", "=26", "2 6", "260", "", "17+9=", "3+5+18=8+18=26"]
    expected = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    n = len(completions)
    assert exact_match([""] * n, completions, answer=["26"] * n, difficulty=[1] * n) == expected
    assert exact_match(["", ""], ["7", "-7"], answer=[7, -7]) == [1.0, 1.0]


def test_resolve_finds_a_function_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_a.py").write_text("class Box:\n    @staticmethod\n    def f(**_): return [3.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_reward("fx_influence.interop.rewards:exact_match") is exact_match
    assert resolve_reward("my_rewards_a:Box.f")() == [3.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact_match", "write it as 'module:function'"),
        (":exact_match", "write it as 'module:function'"),
        ("fx_influence.interop.rewards:", "write it as 'module:function'"),
        ("no_such_module_here:f", "module 'no_such_module_here' cannot be imported .ModuleNotFoundError"),
        ("my_rewards_b:f", "module 'my_rewards_b' cannot be imported .ZeroDivisionError"),
        ("fx_influence.interop.rewards:exact", "has no 'exact'"),
        ("math:pi", "which is float, not a function"),
    ],
)
def test_resolve_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    (tmp_path / "my_rewards_b.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"reward is '{spec}'.*{message}"):
        resolve_reward(spec)


def test_score_passes_the_columns_by_name() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0.5] * len(completions)

    assert score(reward, ("a", "b"), ("c", "d"), {"answer": ("x", "y"), "level": (1, 2)}) == [0.5, 0.5]
    assert seen == {"prompts": ["a", "b"], "completions": ["c", "d"], "answer": ["x", "y"], "level": [1, 2]}


@pytest.mark.parametrize("values", [[True, False], np.array([1, 0]), torch.tensor([1.0, 0.0]), (1, 0)])
def test_score_takes_any_sequence_of_numbers(values: Sequence[float]) -> None:
    scored = score(lambda **_: values, ["a", "b"], ["c", "d"], {})
    assert scored == [1.0, 0.0]
    assert all(type(value) is float for value in scored)


def test_score_names_a_reward_that_raises_and_keeps_the_cause() -> None:
    def picky(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(RewardError, match=r"picky raised KeyError: 'answer'; .*columns \['level'\]") as caught:
        score(picky, ["a"], ["b"], {"level": [1]})
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, None], r"returned None for completion 1 \('d'\)"),
        ([math.nan, 1.0], "returned nan for completion 0"),
        ([1.0, -math.inf], "returned -inf for completion 1"),
        ([1.0, "good"], "returned 'good' for completion 1"),
        ([1.0], "returned 1 values for 2 completions"),
        ([1.0] * 3, "returned 3 values for 2 completions"),
        (None, "returned NoneType for 2 completions"),
        (1.0, "returned float for 2 completions"),
    ],
)
def test_score_wants_one_finite_number_for_each(returned: Any, message: str) -> None:
    def careless(**_: Any) -> Any:
        return returned

    with pytest.raises(ValueError, match=f"careless {message}"):
        score(careless, ["a", "b"], ["c", "d"], {})


def test_score_refuses_columns_that_do_not_fit() -> None:
    calls: list[int] = []

    def reward(**_: Any) -> list[float]:
        calls.append(1)
        return [0.0]

    with pytest.raises(ValueError, match="answer has 2 values for 1 completions"):
        score(reward, ["a"], ["b"], {"answer": [1, 2]})
    with pytest.raises(ValueError, match="prompts has 2 values for 1 completions"):
        score(reward, ["a", "b"], ["b"], {})
    with pytest.raises(ValueError, match="columns holds 'completions'"):
        score(reward, ["a"], ["b"], {"completions": ["c"]})
    assert not calls
