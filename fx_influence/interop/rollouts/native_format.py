"""The rollout files of this library: one JSON object per line."""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fx_influence.interop.rollouts.jsonl import NotFinite, read_json_lines, refuse_not_finite
from fx_influence.interop.rollouts.record import PER_TOKEN, Rollout


def write_rollouts(path: str | os.PathLike[str], rollouts: Iterable[Rollout]) -> None:
    """Write one JSON object per line; ``read_rollouts`` returns every value, floats to the last bit.

    The file appears complete or not at all.

    Raises:
        ValueError: for a number that JSON cannot hold (NaN, infinity), naming the rollout.
    """
    target, text = Path(path), to_json_lines(rollouts)
    # Not the tempfile module: its files are private to their owner and would stay so.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def to_json_lines(rollouts: Iterable[Rollout]) -> str:
    """Return the text that ``write_rollouts`` writes."""
    return "".join(_to_line(rollout) for rollout in rollouts)


def read_native_rollouts(*files: str | os.PathLike[str]) -> list[Rollout]:
    """Read rollouts as ``write_rollouts`` wrote them, UTF-8, one JSON object per line; blank lines are skipped.

    Fields of other names are ignored. The fields of a rollout, with their JSON types:

    - ``id``, ``prompt_id``, ``prompt``, ``completion``: string
    - ``group``: integer
    - ``prompt_ids``, ``completion_ids``: array of integers
    - ``finished``: boolean
    - ``behaviour_logprobs``, ``coefficients``, ``entropy_coefficients``: array of numbers, one for each id in
      ``completion_ids``, or null; may be left out
    - ``completion_mask``: array of booleans, one for each id in ``completion_ids``, or null; may be left out
    - ``reward``, ``advantage``: number or null; may be left out
    - ``approximate``: boolean; may be left out, which means false
    - ``question``, ``source``: string or null; may be left out
    - ``extras``: object of strings, numbers and booleans, or null; may be left out

    A number that is not finite is refused where it counts, and accepted elsewhere: at a token where ``completion_mask``
    is false it becomes 0, and a reward beside an advantage becomes null.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: naming every line that is not a rollout: one that is not JSON, lacks a field or has one of another
            type, or holds a number that is not finite where it counts.
    """
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"rollouts file {str(file)!r} does not exist; expected a file that write_rollouts wrote. Check the path"
            )
    return read_json_lines([Path(file) for file in files], _from_record)


def _to_line(rollout: Rollout) -> str:
    """Return the line of one rollout."""
    try:
        return json.dumps(_record(rollout), allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(
            f"rollout {rollout.id!r} holds a number that is not finite; expected finite ones. Repair it first"
        ) from error


def _record(rollout: Rollout) -> dict[str, Any]:
    """Return the fields that differ from their defaults, which a reader fills in again."""
    fields = dataclasses.fields(Rollout)
    return {f.name: value for f in fields if (value := getattr(rollout, f.name)) != f.default}


def _from_record(_: int, record: dict[str, Any]) -> Rollout:
    """Make a rollout of a parsed line."""
    values: dict[str, Any] = {}
    record = _drop_unused_not_finite(record)
    for field in dataclasses.fields(Rollout):
        if field.name in record:
            values[field.name] = _checked(field.name, record[field.name])
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"no field {field.name!r} among {sorted(record)}; expected it in every rollout")
    return Rollout(**values)


def _drop_unused_not_finite(record: dict[str, Any]) -> dict[str, Any]:
    """Replace numbers that are not finite where they do not count.

    At tokens that were not sampled they become 0; a reward that is not finite becomes None if there is an advantage.
    """
    mask, out = record.get("completion_mask"), dict(record)
    if isinstance(mask, list):
        for name in PER_TOKEN:
            if isinstance(values := record.get(name), list) and len(values) == len(mask):
                pairs = zip(values, mask, strict=True)
                out[name] = [0.0 if isinstance(x, NotFinite) and m is False else x for x, m in pairs]
    if isinstance(record.get("reward"), NotFinite) and type(record.get("advantage")) in (int, float):
        out["reward"] = None
    return out


def _checked(name: str, value: object) -> object:
    """Return the value of a field, as a tuple if it is a list; refuse one of another type."""
    for item in value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]:
        refuse_not_finite(name, item)
    if name in ("prompt_ids", "completion_ids"):
        valid = isinstance(value, list) and all(type(item) is int for item in value)
    elif name in PER_TOKEN:
        kinds = (bool,) if name == "completion_mask" else (int, float)
        valid = value is None or (isinstance(value, list) and all(type(item) in kinds for item in value))
    elif name in ("reward", "advantage"):
        valid = value is None or type(value) in (int, float)
    elif name == "extras":
        valid = value is None or (
            isinstance(value, dict) and all(type(item) in (str, int, float, bool) for item in value.values())
        )
    elif name in ("question", "source"):
        valid = value is None or type(value) is str
    else:
        valid = type(value) is {"group": int, "finished": bool, "approximate": bool}.get(name, str)
    if not valid:
        raise ValueError(f"field {name!r} is {reprlib.repr(value)}; expected the type that write_rollouts gives it")
    return tuple(value) if isinstance(value, list) else value
