"""Checks of single arguments before any long computation; every error names field, value and remedy."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


def wrong_type(field: str, value: object, expected: str, remedy: str) -> TypeError:
    """Return the ``TypeError`` for an argument of the wrong type.

    Args:
        field: name of the argument.
        value: the argument itself, whose type is named.
        expected: description of the right type, a noun phrase.
        remedy: sentence without its full stop.
    """
    kind = "None" if value is None else f"of type {type(value).__name__}"
    return TypeError(f"{field} is {kind}; expected {expected}. {capitalized(remedy)}")


def capitalized(sentence: str) -> str:
    """Return a sentence with a capital first letter; the other letters, unlike ``str.capitalize``, stay."""
    return sentence[:1].upper() + sentence[1:]


def check_tree(field: str, tree: object, remedy: str) -> None:
    """Raise ``TypeError`` unless ``tree`` maps names to tensors, or to None where a name has no value.

    Args:
        field: name of the argument, for messages.
        tree: the argument.
        remedy: end of the message, a sentence without its full stop.
    """
    if not isinstance(tree, Mapping):
        raise wrong_type(field, tree, "a dictionary of tensors by parameter name", remedy)
    for name, value in tree.items():
        if value is not None and not isinstance(value, Tensor):
            raise wrong_type(f"{field}[{name!r}]", value, "a tensor", remedy)


def check_tensor(field: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor; a list or an array is not."""
    if not isinstance(value, Tensor):
        raise wrong_type(field, value, "a tensor", "Make it one: torch.as_tensor(...)")


def check_function(field: str, value: object, remedy: str) -> None:
    """Raise ``TypeError`` unless ``value`` is callable and not a model.

    Args:
        field: name of the argument, for messages.
        value: the argument.
        remedy: end of the message, a sentence without its full stop.
    """
    if not callable(value) or isinstance(value, nn.Module):
        raise wrong_type(field, value, "a function", remedy)


def check_choice(field: str, value: object, known: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``known``; the error names the closest of them.

    Args:
        field: name of the argument, for messages.
        value: the argument.
        known: the allowed values.
    """
    if value not in known:
        raise ValueError(f"{field} is {value!r}; expected one of {', '.join(known)}{did_you_mean(value, known)}")


def did_you_mean(value: object, known: Mapping[str, object] | Sequence[str]) -> str:
    """Return a hint that names the entry of ``known`` closest to ``value``, or "" where none is close.

    Example:
        >>> did_you_mean("frozn", ["frozen", "jacobian"]), did_you_mean("x", ["frozen"])
        (" (the nearest is 'frozen')", '')
    """
    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(value).lower(), names, n=1)
    return f" (the nearest is {names[close[0]]!r})" if close else ""


def check_number(
    field: str, value: object, remedy: str, fits: Callable[[float], bool], expected: str = "a number in its range"
) -> None:
    """Raise ``TypeError`` unless ``value`` is a number, which a tensor is not, and ``ValueError`` unless it fits.

    Args:
        field: name of the argument, for messages.
        value: the argument.
        remedy: end of the message, an imperative without its full stop.
        fits: whether a number is in the allowed range.
        expected: the allowed range, a noun phrase.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        item = "Take the number out of it by .item(), and then " if isinstance(value, Tensor) else ""
        raise wrong_type(field, value, "a number", item + remedy)
    if not fits(float(value)):
        raise ValueError(f"{field} is {value}; expected {expected}. {capitalized(remedy)}")


def check_count(field: str, value: object, remedy: str, least: int = 1) -> None:
    """Raise ``TypeError`` unless ``value`` is an integer, and ``ValueError`` if it is below ``least``.

    Args:
        field: name of the argument, for messages.
        value: the argument.
        remedy: end of the message, an imperative without its full stop.
        least: smallest integer that is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise wrong_type(field, value, "an integer", remedy)
    if value < least:
        raise ValueError(f"{field} is {value}; expected at least {least}. {capitalized(remedy)}")


def check_options(temperature: float, chunk_size: int | None, memory_budget: int | None = None) -> None:
    """Raise ``TypeError`` or ``ValueError`` for options outside their range.

    Args:
        temperature: divisor of the logits, positive and finite.
        chunk_size: rows per pass, at least 1; None chooses by size.
        memory_budget: bytes, at least 0; None chooses by the number of parameters.
    """
    remedy = "pass the one that the rollouts were sampled at"
    check_number("temperature", temperature, remedy, lambda x: 0 < x < math.inf, "a positive number")
    if chunk_size is not None:
        check_count("chunk_size", chunk_size, "pass None to choose by size")
    if memory_budget is not None:
        check_count("memory_budget", memory_budget, "pass a number of bytes, or 0 to keep nothing", least=0)


def check_dtypes(compute_dtype: object, direction_dtype: object) -> None:
    """Raise ``ValueError`` unless each is ``torch.bfloat16`` or None."""
    reasons = {
        "compute_dtype": "Pass bfloat16, whose range is float32's, or None for the parameters' precision",
        "direction_dtype": "Pass bfloat16 to halve the directions, or None for the gradients' precision",
    }
    for (field, remedy), value in zip(reasons.items(), (compute_dtype, direction_dtype), strict=True):
        if value not in (None, torch.bfloat16):
            raise ValueError(f"{field} is {value!r}; expected torch.bfloat16 or None. {remedy}")


def check_max_grad_norm(value: float | None) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``value`` is a positive number or None."""
    if value is not None:
        remedy = "pass the trainer's, or None where nothing is clipped"
        check_number("max_grad_norm", value, remedy, lambda x: x > 0, "a positive number")
