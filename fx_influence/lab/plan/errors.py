"""Errors of plans: the field, its value, what was expected, and the remedy."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from fx_influence.core.checks import did_you_mean


class PlanError(ValueError):
    """A plan that cannot be run, with the field, the value and the remedy."""


def refusal(field: str, value: Any, expected: str, remedy: str = "") -> PlanError:
    """Return the error "{field} is {value}; expected {expected}. {remedy}", with a long value abridged.

    Args:
        field: the plan's field, such as ``update.num_prompts``.
        value: what the plan has there.
        expected: what would have been right.
        remedy: a sentence that says what to do; empty where ``expected`` says it already.

    Example:
        >>> str(refusal("seed", "x", "a whole number"))
        "seed is 'x'; expected a whole number"
    """
    return PlanError(f"{field} is {_abridged.repr(value)}; expected {expected}{'. ' if remedy else ''}{remedy}")


def unknown_field(field: str, value: Any, known: Iterable[str], remedy: str = "") -> PlanError:
    """Return the refusal of a field that is none of ``known``, with the nearest of them by name.

    Args:
        field: the unknown field, such as ``update.promts``.
        value: what the plan has there.
        known: names of the fields that may stand there.
        remedy: what to do instead of renaming the field, where that is known.

    Example:
        >>> str(unknown_field("update.promts", "p.txt", ["prompts", "seed"]))
        "update.promts is 'p.txt'; expected one of the fields prompts, seed (the nearest is 'prompts'). Rename or
        remove it."
    """
    names = list(known)
    close = "" if remedy else did_you_mean(field.rpartition(".")[2], names)
    return refusal(field, value, f"one of the fields {', '.join(names)}{close}", remedy or "Rename or remove it.")


_abridged = reprlib.Repr()
_abridged.maxstring = _abridged.maxother = 80

EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "tuple": "a list",
    "dict": "an object",
}
"""Words for the expected kind of value, by the first word of pydantic's kind of error."""


def type_refusal(field: str, error: ValidationError, hidden: Iterable[str]) -> PlanError:
    """Return pydantic's most specific complaint about a plan's field as a refusal in the plan's own words.

    Args:
        field: name of the plan's field.
        error: what pydantic raised for its value.
        hidden: parts of pydantic's locations that no plan names, such as the tag of a kind of batch.
    """
    worst = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
    parts = [part for part in worst["loc"] if part not in set(hidden)]
    where = field + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    value, context = worst["input"], worst.get("ctx", {})
    if worst["type"] == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"])
        return refusal(where, value, f"one of {', '.join(names)}{did_you_mean(str(value), names)}")
    if worst["type"] in ("missing", "too_long"):
        return refusal(field, list(worst["input"]), "two numbers, below and above")
    expected = EXPECTED.get(worst["type"].partition("_")[0], str(context.get("error", worst["msg"])))
    remedy = "Quote it." if expected == "a text" and not isinstance(value, (list, dict)) else ""
    remedy = f"Put it into [ ]: [{value}]" if expected == "a list" and isinstance(value, (str, int, float)) else remedy
    return refusal(where, value, expected, "Give one, or leave the line out." if value is None else remedy)
