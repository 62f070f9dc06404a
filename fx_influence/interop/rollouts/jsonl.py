"""Records of JSON lines, parsed and checked one by one; one error names every bad record."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fx_influence.interop.rollouts.files import lines

Item = TypeVar("Item")
Value = TypeVar("Value")

MAX_LISTED_PROBLEMS = 10
"""Number of bad records whose faults an error lists; it counts the others."""


def read_json_lines(files: Sequence[Path], parse: Callable[[int, dict[str, Any]], Value]) -> list[Value]:
    """Return ``parse(index, object)`` of each line that is not blank, counted from 0 through all files.

    Raises:
        ValueError: naming each line that holds no JSON object or that ``parse`` refuses with a ``ValueError``.
    """
    return parse_all(_lines(files), lambda index, line: parse(index, json_object(line)))


def parse_all(items: Iterable[tuple[str, Item]], parse: Callable[[int, Item], Value]) -> list[Value]:
    """Return ``parse(index, item)`` of each item, which comes with its position.

    Raises:
        ValueError: one error that names every refused item.
    """
    values: list[Value] = []
    problems: list[str] = []
    for index, (position, item) in enumerate(items):
        try:
            values.append(parse(index, item))
        # OverflowError: a number too large for a float. RecursionError: brackets nested too deep for the parser.
        except (ValueError, OverflowError, RecursionError) as error:
            problems.append(f"{position}: {error}")
    if problems:
        more = len(problems) - MAX_LISTED_PROBLEMS
        rest = [f"and {more} more, {len(problems)} in all"] if more > 0 else []
        raise ValueError("\n".join(problems[:MAX_LISTED_PROBLEMS] + rest))
    return values


def json_object(line: bytes) -> dict[str, Any]:
    """Return the object of a line, with ``NotFinite`` for NaN and infinities.

    Raises:
        ValueError: for anything else.
    """
    try:
        record = json.loads(line.decode("utf-8-sig"), parse_constant=NotFinite, parse_float=_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not JSON ({error.msg}); expected one object on each line") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"this is not UTF-8 ({error}); expected UTF-8. Convert the file first") from error
    if type(record) is not dict:
        raise ValueError(f"this holds {type(record).__name__}; expected one object on each line")
    return record


class NotFinite(float):
    """NaN or an infinity in a record; its type is not float, so that no field accepts it as a number.

    A trainer may write some in values that are never used: in extras of its reward, in padding, at tokens of the
    prompt. Only the reader of a format knows which values count, and refuses those.
    """

    def __new__(cls, text: str) -> NotFinite:
        value = super().__new__(cls, text)
        value.text = text
        return value

    text: str


def refuse_not_finite(name: str, value: object) -> None:
    """Raise ``ValueError`` for a ``NotFinite`` in field ``name``."""
    if isinstance(value, NotFinite):
        raise ValueError(f"field {name!r} holds the number {value.text}; expected a finite one. Repair it first")


def field(record: dict[str, Any], name: str, kinds: tuple[type, ...], what: str) -> Any:
    """Return ``record[name]``.

    Args:
        record: the parsed object.
        name: of the field.
        kinds: accepted types; a bool does not count as an int.
        what: the accepted values in words, for the error.

    Raises:
        ValueError: if the field is missing or of none of ``kinds``.
    """
    if name not in record:
        raise ValueError(f"no field {name!r} among {sorted(record)}; expected it to be {what}")
    refuse_not_finite(name, record[name])
    # Not isinstance: True would pass for an int.
    if type(record[name]) not in kinds:
        raise ValueError(f"field {name!r} is {reprlib.repr(record[name])}; expected {what}")
    return record[name]


def fields(
    record: dict[str, Any], name: str, kinds: tuple[type, ...], what: str, counts: Sequence[bool] | None = None
) -> list[Any]:
    """Return the list ``record[name]``, whose items are checked as by ``field``.

    Args:
        record: the parsed object.
        name: of the field.
        kinds: accepted types of the items.
        what: the accepted items in words, for the error.
        counts: whether each item counts; None if all do. An item that does not count and is not finite becomes None.

    Raises:
        ValueError: if the field is missing, is not a list, or holds an item of none of ``kinds``.
    """
    values: list[Any] = list(field(record, name, (list,), f"a list of {what}"))
    for index, value in enumerate(values):
        if isinstance(value, NotFinite) and counts is not None and not (index < len(counts) and counts[index]):
            values[index] = None
            continue
        refuse_not_finite(name, value)
        if type(value) not in kinds:
            raise ValueError(f"field {name!r} holds {reprlib.repr(value)} at {index}; expected {what} only")
    return values


def _lines(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield the position and the bytes of each line that is not blank."""
    for path in files:
        yield from ((f"{path}, line {number}", line) for number, line in enumerate(lines(path), 1) if line.strip())


def _number(text: str) -> float:
    """Return a float, or ``NotFinite`` for a literal that overflows."""
    value = float(text)
    return value if math.isfinite(value) else NotFinite(text)
