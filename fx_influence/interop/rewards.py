"""Reward functions with the signature of TRL: ``fn(prompts, completions, **columns) -> list[float]``."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

Reward = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]
"""``fn(prompts=[...], completions=[...], completion_ids=[...], **columns)``: one number per completion, as in TRL.

Columns are lists as long. For a conversation the prompt is a list of messages and the completion a list of one, the
assistant's; else both are texts. ``completion_ids`` goes to a function that names it or takes ``**columns``; TRL's
``trainer_state``, ``log_extra`` and ``log_metric`` are not passed. None stands for "does not apply to this one".
"""

Conversed = str | Sequence[Mapping[str, Any]]
"""A text, or a list of messages."""

RESERVED = ("prompts", "completions", "completion_ids")

TIMEOUT = 5
"""Seconds for parsing, and for comparing, one expression; math-verify's own default."""


def exact_match(
    prompts: Sequence[Conversed], completions: Sequence[Conversed], answer: Sequence[Any], **columns: Any
) -> list[float]:
    """1.0 where the text after the last ``=`` of a completion, stripped, is the answer, else 0.0.

    A completion without ``=`` is compared as a whole: for answers within a text, such as GSM8K's, see ``math_verify``.
    All arguments are lists of one length, as is the result.

    Example:
        >>> exact_match(["3+14+9="] * 3, ["17+9=26", " 26 ", "17+9=27"], ["26", 26, "26"])
        [1.0, 1.0, 0.0]
    """
    pairs = zip(map(_text, completions), answer, strict=True)
    return [float(completion.rsplit("=", 1)[-1].strip() == str(expected).strip()) for completion, expected in pairs]


def math_verify(
    completions: Sequence[Conversed],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the answer that math-verify finds in a completion equals the gold one as mathematics, else 0.0.

    The gold one is ``answer``, an expression, plain or LaTeX; where there is none, what math-verify finds in
    ``solution``, a text. In a completion that is a boxed or announced answer, or else the last expression. None where
    the gold one is missing or is no mathematics, as ``trl.rewards:accuracy_reward`` has it, which wants LaTeX in the
    completion. Outside the main thread nothing limits the seconds that an expression takes: math-verify uses signals.

    Raises ``ImportError`` without math-verify, and ``ValueError`` where there is neither column.
    Source: https://github.com/huggingface/Math-Verify.

    Example:
        >>> math_verify(["He pays 2 * 900 = $1,800.", r"\\boxed{\\frac{1}{3}}", "17"], answer=["1800", "1/3", 18])
        [1.0, 1.0, 0.0]
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("the reward math_verify needs math-verify: pip install 'fx-influence[math]'") from error
    if answer is None and solution is None:
        found = sorted(set(columns) - set(RESERVED))
        raise ValueError(f'reward math_verify needs a column "answer" or "solution", not {found}; add one')
    limit = TIMEOUT if threading.current_thread() is threading.main_thread() else None
    nothing = [None] * len(completions)
    rows = zip(nothing if answer is None else answer, nothing if solution is None else solution, strict=True)
    golds = [_gold(*row) for row in rows]
    parsed = {gold: parse(gold, parsing_timeout=limit) for gold in set(golds)}
    return [
        float(verify(parsed[gold], parse(_text(completion), parsing_timeout=limit), timeout_seconds=limit))
        if parsed[gold]
        else None
        for completion, gold in zip(completions, golds, strict=True)
    ]


def _gold(answer: Any, solution: Any) -> str:
    if answer is None:
        return "" if solution is None else str(solution)
    # Bare, math-verify would find only the 6 in 6\sqrt{3} and the 2 in 2x+3.
    return rf"\boxed{{{answer}}}"


def _text(conversed: Conversed) -> str:
    return conversed if isinstance(conversed, str) else str(conversed[0]["content"])
