"""Reward functions: resolved by name, checked against columns, and called, TRL's among them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fx_influence.interop.rewards import exact_match, math_verify
from fx_influence.interop.scoring import RewardError, check_reward, resolve_reward, score


def test_score_calls_trl_rewards_unchanged() -> None:
    completions = [[{"role": "assistant", "content": text}] for text in (r"<think>a</think>\boxed{18}", "18", "?")]
    columns = {"answer": ["18"] * 3, "solution": ["#### 18", "#### 18", "(no gold)"]}
    arguments = ([[{"role": "user", "content": "?"}]] * 3, completions, columns, [[1, 2, 1, 2], [1, 2], [1]])
    accuracy = resolve_reward("trl.rewards:accuracy_reward")
    check_reward(accuracy, columns)
    assert score(accuracy, *arguments) == [1.0, 0.0, None]
    assert score(resolve_reward("trl.rewards:think_format_reward"), *arguments) == [1.0, 0.0, 0.0]
    make_repetition: Any = resolve_reward("trl.rewards:get_repetition_penalty_reward")
    repetition = make_repetition(ngram_size=1, max_penalty=-1.0)
    assert score(repetition, *arguments) == [-0.5, 0.0, 0.0]
    with pytest.raises(RewardError, match=r"accuracy_reward raised .* completions as texts \(chat and the form"):
        score(accuracy, ["?"], ["18"], {"solution": ["18"]})
    with pytest.raises(RewardError, match=r"repetition_penalty_reward raised TypeError.*completion_ids"):
        score(repetition, ["?"], ["18"], {})


def test_score_passes_completion_ids_to_accepting_functions() -> None:
    seen: list[Any] = []

    def named(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        seen.append(completion_ids)
        return [0.0]

    def any_of_them(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return named(prompts, completions, **columns)

    def narrow(prompts: list[str], completions: list[str]) -> list[float]:
        return [1.0]

    @functools.wraps(narrow)
    def handed_on(**arguments: Any) -> list[float]:
        return narrow(**arguments)

    for reward in (named, any_of_them, narrow, handed_on):
        score(reward, ["a"], ["b"], {}, [[3, 4]])
    assert seen == [[[3, 4]], [[3, 4]]]
    with pytest.raises(ValueError, match="completion_ids has 2 values; expected 1"):
        score(named, ["a"], ["b"], {}, [[3], [4]])


def test_score_awaits_asynchronous_reward() -> None:
    async def judge(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    assert score(judge, ["a", "a"], ["b", "cde"], {}) == [1.0, 3.0]


@pytest.mark.parametrize(
    ("spec", "columns", "message"),
    [
        (
            "fx_influence.interop.rewards:exact_match",
            ["gold"],
            r"columns \['gold'\]: missing .* 'answer'; expected columns that it takes. Give the prompts",
        ),
        ("trl.rewards:accuracy_reward", ["answer"], r"accuracy_reward cannot be called .* missing .* 'solution'"),
        (
            "fx_influence.interop.rewards:math_verify",
            ["gold"],
            r"are \['gold'\]; expected \"answer\" or \"solution\"",
        ),
        ("my_rewards_c:narrow", ["level"], r"my_rewards_c:narrow cannot be called .* 'level'.*let it take \*\*columns"),
        ("my_rewards_c:state", [], r"missing a required .* 'trainer_state'"),
        ("my_rewards_c:narrow", ["completion_ids"], "columns holds 'completion_ids', an argument of every reward"),
    ],
)
def test_check_reward_refuses_columns_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, columns: list[str], message: str
) -> None:
    functions = "def narrow(prompts, completions): 1 / 0\ndef state(completions, trainer_state, **columns): 1 / 0\n"
    (tmp_path / "my_rewards_c.py").write_text(functions)
    monkeypatch.syspath_prepend(tmp_path)
    reward = resolve_reward(spec)
    with pytest.raises(ValueError, match=message):
        check_reward(reward, columns)


def test_check_reward_does_not_call_reward() -> None:
    def costly(completions: list[str], answer: list[str], level: int = 0, **columns: Any) -> list[float]:
        pytest.fail("called")

    @functools.wraps(costly)
    def adapted(prompts: list[str], completions: list[str], gold: list[str]) -> list[float]:
        return costly(completions, gold)

    check_reward(costly, ["answer", "difficulty"])
    check_reward(adapted, ["gold"])
    check_reward(math_verify, ["solution", "difficulty"])
    # Some functions written in C have no signature to compare with.
    check_reward(max, ["answer"])


def test_resolve_reward_finds_function_in_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_a.py").write_text("class Box:\n    @staticmethod\n    def f(**_): return [3.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_reward("fx_influence.interop.rewards:exact_match") is exact_match
    assert resolve_reward("my_rewards_a:Box.f")() == [3.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact_match", "expected 'module:function'"),
        (":exact_match", "expected 'module:function'"),
        ("fx_influence.interop.rewards:", "expected 'module:function'"),
        ("no_such_module_here:f", "module 'no_such_module_here' cannot be imported .ModuleNotFoundError"),
        ("my_rewards_b:f", "module 'my_rewards_b' cannot be imported .ZeroDivisionError"),
        ("fx_influence.interop.rewards:exact", "has no 'exact'"),
        ("math:pi", "of type float; expected a function"),
    ],
)
def test_resolve_reward_names_the_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    (tmp_path / "my_rewards_b.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"reward is '{spec}'.*{message}"):
        resolve_reward(spec)


def test_score_passes_columns_by_name() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0.5] * len(completions)

    assert score(reward, ("a", "b"), ("c", "d"), {"answer": ("x", "y"), "level": (1, 2)}) == [0.5, 0.5]
    assert score(lambda **_: [None, 2], ["a", "b"], ["c", "d"], {}) == [None, 2.0]
    assert seen == {"prompts": ["a", "b"], "completions": ["c", "d"], "answer": ["x", "y"], "level": [1, 2]}


@pytest.mark.parametrize("values", [[True, False], np.array([1, 0]), torch.tensor([1.0, 0.0]), (1, 0)])
def test_score_accepts_any_sequence_of_numbers(values: Sequence[float]) -> None:
    scored = score(lambda **_: values, ["a", "b"], ["c", "d"], {})
    assert scored == [1.0, 0.0]
    assert all(type(value) is float for value in scored)


def test_score_chains_error_of_reward() -> None:
    def picky(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(RewardError, match=r"picky raised KeyError: 'answer'; .*columns \['level'\]") as caught:
        score(picky, ["a"], ["b"], {"level": [1]})
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, []], r"returned \[\] for completion 1 \('d'\); expected a finite number, or None"),
        ([math.nan, 1.0], "returned nan for completion 0"),
        ([1.0, -math.inf], "returned -inf for completion 1"),
        ([1.0, "good"], "returned 'good' for completion 1"),
        ([1.0], "returned 1 values; expected 2"),
        ([1.0] * 3, "returned 3 values; expected 2"),
        (None, "returned NoneType; expected 2"),
        (1.0, "returned float; expected 2"),
    ],
)
def test_score_refuses_invalid_rewards(returned: Any, message: str) -> None:
    def careless(**_: Any) -> Any:
        return returned

    with pytest.raises(ValueError, match=f"careless {message}"):
        score(careless, ["a", "b"], ["c", "d"], {})


def test_score_refuses_columns_of_other_lengths() -> None:
    calls: list[int] = []

    def reward(**_: Any) -> list[float]:
        calls.append(1)
        return [0.0]

    with pytest.raises(ValueError, match="answer has 2 values; expected 1"):
        score(reward, ["a"], ["b"], {"answer": [1, 2]})
    with pytest.raises(ValueError, match="prompts has 2 values; expected 1"):
        score(reward, ["a", "b"], ["b"], {})
    with pytest.raises(ValueError, match="columns holds 'completions'"):
        score(reward, ["a"], ["b"], {"completions": ["c"]})
    assert not calls
