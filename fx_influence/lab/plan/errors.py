"""Errors of plans: the field, its value, what was expected and the remedy."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


class PlanError(ValueError):
    """A plan that cannot be run, with the field, the value and the remedy."""


def refusal(field: str, value: Any, expected: str, remedy: str = "") -> PlanError:
    """Return the error "{field} is {value}; expected {expected}. {remedy}", with a long value abridged.

    Example:
        >>> str(refusal("seed", "x", "a whole number"))
        "seed is 'x'; expected a whole number"
    """
    return PlanError(f"{field} is {_abridged.repr(value)}; expected {expected}{'. ' if remedy else ''}{remedy}")


def unknown_field(field: str, value: Any, known: Iterable[str], remedy: str = "") -> PlanError:
    """Return the refusal of a field that is none of ``known``: ``remedy``, or else the nearest of them by name.

    Example:
        >>> str(unknown_field("update.promts", "p.txt", ["prompts", "seed"]))
        "update.promts is 'p.txt'; expected one of the fields prompts, seed. Did you mean prompts?"
    """
    names = list(known)
    remedy = remedy or did_you_mean(field.rpartition(".")[2], names) or "Remove it."
    return refusal(field, value, f"one of the fields {', '.join(names)}", remedy)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the question for the nearest of ``names``, nothing where none is near."""
    near = difflib.get_close_matches(name.lower(), names, n=1)
    return f"Did you mean {near[0]}?" if near else ""


_abridged = reprlib.Repr()


_abridged.maxstring = _abridged.maxother = 80
