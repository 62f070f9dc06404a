"""Built-in reward functions with the signature of TRL: ``fn(prompts, completions, **columns) -> list[float]``."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

Reward = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]
"""``fn(prompts=[...], completions=[...], completion_ids=[...], **columns)``: one number per completion, as in TRL.

Columns are lists of the same length. For a conversation the prompt is a list of messages and the completion a list of
one message, the assistant's; otherwise both are texts. ``completion_ids`` is passed to a function that names it or
takes ``**columns``; TRL's ``trainer_state``, ``log_extra`` and ``log_metric`` are not passed. None means that the
reward does not apply to this completion.
"""

TextOrMessages = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation as a list of messages."""

RESERVED = ("prompts", "completions", "completion_ids")
"""Arguments of every reward function, which no column may be named after."""

TIMEOUT = 5
"""Seconds for parsing one expression, and for comparing one; math-verify's own default."""


def exact_match(
    prompts: Sequence[TextOrMessages], completions: Sequence[TextOrMessages], answer: Sequence[Any], **columns: Any
) -> list[float]:
    """Return 1.0 for a completion whose text after the last ``=``, stripped, is the answer, else 0.0.

    A completion without ``=`` is compared as a whole; for answers inside a text, such as GSM8K's, see ``math_verify``.

    Args:
        prompts: n texts or conversations, not used.
        completions: n texts or lists of one message.
        answer: n expected answers, compared as stripped text.
        columns: further columns, not used.

    Returns:
        n numbers, 1.0 or 0.0.

    Example:
        >>> exact_match(["3+14+9="] * 3, ["17+9=26", " 26 ", "17+9=27"], ["26", 26, "26"])
        [1.0, 1.0, 0.0]
    """
    pairs = zip(map(completion_text, completions), answer, strict=True)
    return [float(completion.rsplit("=", 1)[-1].strip() == str(expected).strip()) for completion, expected in pairs]


def math_verify(
    completions: Sequence[TextOrMessages],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float | None]:
    """Return 1.0 for a completion whose answer equals the gold one as mathematics, else 0.0.

    The gold answer is ``answer``, an expression, plain or LaTeX; if it is missing, the answer that math-verify finds in
    the text ``solution``. In a completion math-verify takes a boxed or announced answer, or else the last expression.
    ``trl.rewards:accuracy_reward`` returns None in the same cases, but requires LaTeX in the completion.

    Args:
        completions: n texts or lists of one message.
        answer: n gold expressions; None without such a column.
        solution: n texts that contain the gold answer; None without such a column.
        columns: further columns, not used.

    Returns:
        n numbers, 1.0 or 0.0; None where the gold answer is missing or cannot be parsed.

    Raises:
        ImportError: without math-verify.
        ValueError: if there is neither column.

    Note:
        Outside the main thread nothing limits the seconds that an expression takes: math-verify uses signals.

    Example:
        >>> math_verify(["He pays 2 * 900 = $1,800.", r"\\boxed{\\frac{1}{3}}", "17"], answer=["1800", "1/3", 18])
        [1.0, 1.0, 0.0]

    Source: https://github.com/huggingface/Math-Verify.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("the reward math_verify needs math-verify: pip install 'fx-influence[math]'") from error
    if answer is None and solution is None:
        names = sorted(set(columns) - set(RESERVED))
        raise ValueError(
            f'the columns of reward math_verify are {names}; expected "answer" or "solution" among them. Add one'
        )
    limit = TIMEOUT if threading.current_thread() is threading.main_thread() else None
    absent = [None] * len(completions)
    rows = zip(absent if answer is None else answer, absent if solution is None else solution, strict=True)
    golds = [_gold_expression(*row) for row in rows]
    parsed = {gold: parse(gold, parsing_timeout=limit) for gold in set(golds)}
    return [
        float(verify(parsed[gold], parse(completion_text(completion), parsing_timeout=limit), timeout_seconds=limit))
        if parsed[gold]
        else None
        for completion, gold in zip(completions, golds, strict=True)
    ]


def _gold_expression(answer: Any, solution: Any) -> str:
    if answer is None:
        return "" if solution is None else str(solution)
    # Without the box math-verify would find only the 6 in 6\sqrt{3} and the 2 in 2x+3.
    return rf"\boxed{{{answer}}}"


def completion_text(completion: TextOrMessages) -> str:
    """Return the text of a completion, which a conversation has in its only message."""
    return completion if isinstance(completion, str) else str(completion[0]["content"])
