"""Display of result records in one line of text: shapes of tensors, counts of long collections."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from fx_influence.core.computed import layout_of


def record_line(record: Any, defaults: Mapping[str, Any] | None = None) -> str:
    """Return a named tuple or dataclass in a line, with shapes for tensors and counts for long collections.

    Args:
        record: the named tuple or dataclass.
        defaults: values by field; a field that has its default is left out of the line.

    Example:
        >>> from fx_influence.types import TokenValues
        >>> import torch
        >>> record_line(TokenValues(torch.zeros(2, 3), torch.tensor(0.5)))
        'TokenValues(logprobs=float32 (2, 3), entropies=0.5)'
    """
    names = record._fields if hasattr(record, "_fields") else [field.name for field in dataclasses.fields(record)]
    values = {name: getattr(record, name) for name in names}
    if defaults:
        values = {name: x for name, x in values.items() if name not in defaults or x != defaults[name]}
    return f"{type(record).__name__}({', '.join(f'{name}={brief(x)}' for name, x in values.items())})"


def brief(value: Any) -> str:
    """Return a value in a few words: numbers unchanged, texts abridged, collections by kind and count.

    Example:
        >>> brief({"w": 1.0}), brief(list(range(9))), brief("x" * 99)[:7]
        ("{'w': 1.0}", '9 of int', "'xxxxxx")
    """
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, (str, PathLike)):
        return _ABRIDGED.repr(str(value))
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _array(value)
    if hasattr(value, "_fields") or dataclasses.is_dataclass(value):
        return repr(value)
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, (list, tuple)):
        return _sequence(value)
    return type(value).__name__


_ABRIDGED = reprlib.Repr()
_ABRIDGED.maxstring = 60
MAX_LISTED = 3


def _array(value: Any) -> str:
    """Return the value of a scalar, else dtype and shape."""
    shape = tuple(value.shape)
    if not shape:
        try:
            return f"{value.item():.6g}"
        # Under torch.vmap a scalar has no single value.
        except (RuntimeError, ValueError):
            pass
    return f"{str(value.dtype).removeprefix('torch.')} {shape}"


def _mapping(value: Mapping[Any, Any]) -> str:
    """Return the entries of a short mapping, else their number."""
    value = layout_of(value)
    arrays = [x for x in value.values() if hasattr(x, "shape")]
    if arrays and len(arrays) == len(value):
        return f"{len(value)} tensors of {sum(_numel(x) for x in arrays):,} numbers"
    if len(value) <= MAX_LISTED and all(isinstance(x, (int, float, str, type(None))) for x in value.values()):
        return f"{{{', '.join(f'{brief(name)}: {brief(x)}' for name, x in value.items())}}}"
    return f"{len(value)} by name"


def _sequence(value: Sequence[Any]) -> str:
    """Return the items of a short sequence, else their number and types."""
    if len(value) <= MAX_LISTED and all(isinstance(x, (int, float, str)) for x in value):
        return f"[{', '.join(map(brief, value))}]"
    if len(value) == 1 and (hasattr(value[0], "_fields") or dataclasses.is_dataclass(value[0])):
        return f"[{value[0]!r}]"
    kinds = {type(x).__name__ for x in value}
    return f"{len(value)} of {' or '.join(sorted(kinds))}" if value else "[]"


def _numel(x: Any) -> int:
    """Return the number of entries of an array of any library."""
    size = 1
    for n in x.shape:
        size *= int(n)
    return size


def printable(text: str) -> str:
    """Return untrusted text with controls, escapes, bidirectional marks and the like replaced by escape sequences.

    Example:
        >>> printable("a\\x1b[31m\\u202eb")
        'a\\\\x1b[31m\\\\u202eb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
