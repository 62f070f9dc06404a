"""Records of a file: parsed and checked one by one, with every bad one named in a single error."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")

SPELLED_OUT = 10
"""Bad records whose faults an error spells out; it counts the others."""


def read_json_lines(files: Sequence[Path], parse: Callable[[int, dict[str, Any]], Value]) -> list[Value]:
    """``parse(index, object)`` of each line that is not blank, counted from 0 through all files.

    Raises ``ValueError``, naming each line that holds no JSON object or what ``parse`` refuses with a ``ValueError``.
    """
    return read_all(_lines(files), lambda index, line: parse(index, json_object(line)))


def read_all(items: Iterable[tuple[str, Item]], parse: Callable[[int, Item], Value]) -> list[Value]:
    """``parse(index, item)`` of each item, given with its place; one ``ValueError`` names all that are refused."""
    values: list[Value] = []
    problems: list[str] = []
    for index, (place, item) in enumerate(items):
        try:
            values.append(parse(index, item))
        # The last two: a number too large for a float, and brackets nested too deep for the parser.
        except (ValueError, OverflowError, RecursionError) as error:
            problems.append(f"{place}: {error}")
    if problems:
        more = len(problems) - SPELLED_OUT
        rest = [f"and {more} more, {len(problems)} in all"] if more > 0 else []
        raise ValueError("\n".join(problems[:SPELLED_OUT] + rest))
    return values


def json_object(line: bytes) -> dict[str, Any]:
    """The object of a line, with ``NotFinite`` for NaN and infinities. Raises ``ValueError`` for anything else."""
    try:
        record = json.loads(line.decode("utf-8-sig"), parse_constant=NotFinite, parse_float=_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not JSON ({error.msg}); each line must hold one object") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"this is not UTF-8 ({error}); convert the file first") from error
    if type(record) is not dict:
        raise ValueError(f"this holds {type(record).__name__}; each line must hold one object")
    return record


class NotFinite(float):
    """NaN or an infinity in a record; its type is not float, so that no field takes it for a number.

    A trainer may write some where nobody reads: in extras of its reward, in padding, at tokens of the prompt. Only a
    reader knows whether a value counts, and refuses it then.
    """

    def __new__(cls, text: str) -> NotFinite:
        value = super().__new__(cls, text)
        value.text = text
        return value

    text: str


def refuse_not_finite(name: str, value: object) -> None:
    """Raise ``ValueError`` for a ``NotFinite``; ``name``: the field that it counts in."""
    if isinstance(value, NotFinite):
        raise ValueError(f"field {name!r} holds the number {value.text}, which is not finite; repair it first")


def field(record: dict[str, Any], name: str, kinds: tuple[type, ...], what: str) -> Any:
    """``record[name]``. Raises ``ValueError`` if it is missing or of none of ``kinds``, put in words by ``what``."""
    if name not in record:
        raise ValueError(f"no field {name!r}, which must be {what}; the record has {sorted(record)}")
    refuse_not_finite(name, record[name])
    # Not isinstance: True is an int too, and no number here.
    if type(record[name]) not in kinds:
        raise ValueError(f"field {name!r} is {reprlib.repr(record[name])}; it must be {what}")
    return record[name]


def fields(
    record: dict[str, Any], name: str, kinds: tuple[type, ...], what: str, counts: Sequence[bool] | None = None
) -> list[Any]:
    """The list ``record[name]``, whose items are checked as by ``field``.

    ``counts``: which of them count, None for all; elsewhere a number that is not finite is None.
    """
    values: list[Any] = list(field(record, name, (list,), f"a list of {what}"))
    for place, value in enumerate(values):
        if isinstance(value, NotFinite) and counts is not None and not (place < len(counts) and counts[place]):
            values[place] = None
            continue
        refuse_not_finite(name, value)
        if type(value) not in kinds:
            raise ValueError(f"field {name!r} holds {reprlib.repr(value)} at {place}; it must hold {what} only")
    return values


def _lines(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    for path in files:
        # As bytes: text mode would also split at a lone carriage return, and fail at the first bad byte of the file.
        with open(path, "rb") as file:
            yield from ((f"{path}, line {number}", line) for number, line in enumerate(file, 1) if line.strip())


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else NotFinite(text)
