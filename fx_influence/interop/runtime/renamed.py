"""Names that version 0.1 stored in plans and summaries, and what they are called now.

The one place where old names are known. Readers of stored files pass what they read through ``current_plan`` or
``current_summary``; nothing is written under an old name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLAN_FIELDS: dict[str, str] = {"gain": "preconditioner"}
"""Fields of the plans of ``fx-influence run``: old name -> present name."""

PLAN_VALUES: dict[str, dict[str, str]] = {"preconditioner": {"share": "frozen", "marginal": "jacobian"}}
"""Values of these fields: present field name -> {old value: present value}."""

SUMMARY_FIELDS: dict[str, str] = {"realised": "measured", "realised_stderr": "measured_stderr"}
"""Fields of ``summary.json`` and ``eval_XX.json``, those of the metrics in ``in_this_step`` included."""


def current_plan(stored: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """Return a plan's fields with present names and values in place of those of version 0.1.

    Args:
        stored: fields of the plan as read from a file.
        fields: old name -> present name, of a plan of this kind.

    Raises:
        ValueError: where a field is there under its old and its present name.

    Example:
        >>> current_plan({"gain": "share", "seed": 1}, PLAN_FIELDS)
        {'preconditioner': 'frozen', 'seed': 1}
    """
    current: dict[str, Any] = {}
    for old, value in stored.items():
        name = fields.get(old, old)
        if name != old and name in stored:
            raise ValueError(f"{old} is {value!r} beside {name}, its present name; expected one of them. Remove {old}")
        values = PLAN_VALUES.get(name, {}) if name in fields.values() else {}
        current[name] = values.get(value, value) if isinstance(value, str) else value
    return current


def plan_notes(stored: Mapping[str, Any], fields: Mapping[str, str]) -> list[str]:
    """Return a sentence for each field or value of a stored plan that has another name now.

    Args:
        stored: fields of the plan as read from a file.
        fields: old name -> present name, of a plan of this kind.

    Example:
        >>> plan_notes({"gain": "share", "seed": 1}, PLAN_FIELDS)
        ['gain: share is called preconditioner: frozen now; it is read as that']
    """
    notes = []
    for old, value in stored.items():
        [(name, present)] = current_plan({old: value}, fields).items()
        if (name, present) != (old, value):
            notes.append(f"{old}: {value} is called {name}: {present} now; it is read as that")
    return notes


def current_summary(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a summary, and the mappings inside it, with present names in place of those of version 0.1.

    Example:
        >>> current_summary({"total": 1.0, "in_this_step": {"realised": 0.5}})
        {'total': 1.0, 'in_this_step': {'measured': 0.5}}
    """
    return {SUMMARY_FIELDS.get(name, name): _current_value(value) for name, value in stored.items()}


def _current_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return current_summary(value)
    return [_current_value(item) for item in value] if isinstance(value, list) else value
