"""The reward functions of this library."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import math_verify as math_verify_package
import pytest

from fx_influence.interop.rewards import exact_match, math_verify


def test_exact_match_reads_text_after_last_equals_sign() -> None:
    completions = ["17+9=26", "26", " 26 ", "26=17", "=26", "2 6", "260", "", "17+9=", "3+5+18=8+18=26"]
    expected = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    n = len(completions)
    assert exact_match([""] * n, completions, answer=["26"] * n, difficulty=[1] * n) == expected
    assert exact_match(["", ""], ["7", "-7"], answer=[7, -7]) == [1.0, 1.0]


MATHEMATICS = [
    ("18", "She makes 9 * 2 = $18 every day.\n#### 18", 1.0),
    ("18", "18, no: 17", 0.0),
    ("18", r"so \boxed{18}, and not 17", 1.0),
    ("1248", "1,248 clips", 1.0),
    ("-5", "The answer is -5.", 1.0),
    (18, "36/2", 1.0),
    ("1/3", r"\boxed{\frac{1}{3}}", 1.0),
    (r"6\sqrt{3}", "6", 0.0),
    (r"6\sqrt{3}", r"$\sqrt{108}$", 1.0),
    ("2x+3", "2", 0.0),
    (r"\boxed{3}", "3", 1.0),
    ("18", "I do not know.", 0.0),
    ("", "18", None),
    (None, "18", None),
]


@pytest.mark.parametrize("conversation", [False, True])
def test_math_verify_compares_expressions(conversation: bool) -> None:
    texts = [text for _, text, _ in MATHEMATICS]
    completions = [[{"role": "assistant", "content": text}] for text in texts] if conversation else texts
    rewards = math_verify(completions, answer=[gold for gold, _, _ in MATHEMATICS], prompts=texts)
    assert rewards == [expected for _, _, expected in MATHEMATICS]


def test_math_verify_uses_solution_without_answer() -> None:
    worked = "He has 9 left, and 9 * 2 = <<9*2=18>>18.\n#### 18"
    assert math_verify(["18", "9"], solution=[worked] * 2) == [1.0, 0.0]
    assert math_verify(["18", "9"], answer=[None, "9"], solution=[worked] * 2) == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"are \['gold'\]; expected \"answer\" or"):
        math_verify(["18"], prompts=["?"], gold=["18"])


def test_math_verify_has_timeout_in_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int | None] = []
    parse, verify = math_verify_package.parse, math_verify_package.verify

    def parsed(text: str, parsing_timeout: int | None) -> Any:
        limits.append(parsing_timeout)
        return parse(text, parsing_timeout=parsing_timeout)

    def verified(gold: Any, answer: Any, timeout_seconds: int | None) -> bool:
        limits.append(timeout_seconds)
        return verify(gold, answer, timeout_seconds=timeout_seconds)

    monkeypatch.setattr(math_verify_package, "parse", parsed)
    monkeypatch.setattr(math_verify_package, "verify", verified)
    arguments = {"completions": ["18", "17"], "answer": ["18", "18"]}
    assert math_verify(**arguments) == [1.0, 0.0]
    assert limits == [5] * 5
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(math_verify, **arguments).result() == [1.0, 0.0]
    assert limits[5:] == [None] * 5


def test_math_verify_needs_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"needs math-verify: pip install 'fx-influence\[math\]'$"):
        math_verify(["18"], answer=["18"])


def test_exact_match_reads_conversations() -> None:
    completions = [[{"role": "assistant", "content": text}] for text in ("17+9=26", "#### 26")]
    assert exact_match([[{"role": "user", "content": "17+9="}]] * 2, completions, answer=["26"] * 2) == [1.0, 0.0]
