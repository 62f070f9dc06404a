"""Names that version 0.1 stored in plans, summaries and logs, and what they are called now.

The one place where old names are known. Readers of stored files pass what they read through ``renamed``; nothing is
written under an old name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SUMMARY_FIELDS: dict[str, str] = {
    "realised": "measured",
    "realised_stderr": "measured_stderr",
}
"""Fields of ``summary.json`` and ``eval_XX.json``, those of the metrics in ``in_this_step`` included."""

PLAN_FIELDS: dict[str, str] = {"gain": "preconditioner"}
"""Fields of ``plan.yaml``."""

PLAN_VALUES: dict[str, dict[Any, Any]] = {"preconditioner": {"share": "frozen", "marginal": "jacobian"}}
"""Values of plan fields, by the field's present name."""


def renamed(
    stored: Mapping[str, Any], fields: Mapping[str, str], values: Mapping[str, Mapping[Any, Any]] | None = None
) -> dict[str, Any]:
    """Return a stored mapping, and the mappings inside it, with present names in place of old ones.

    Args:
        stored: as read from a file; a present name in it is left as it is.
        fields: old field name -> present field name.
        values: present field name -> {old value: present value}.

    Example:
        >>> renamed({"total": 1.0, "in_this_step": {"realised": 0.5}}, SUMMARY_FIELDS)
        {'total': 1.0, 'in_this_step': {'measured': 0.5}}
        >>> renamed({"gain": "share"}, PLAN_FIELDS, PLAN_VALUES)
        {'preconditioner': 'frozen'}
    """
    current: dict[str, Any] = {}
    for old_name, value in stored.items():
        name = fields.get(old_name, old_name)
        if isinstance(value, Mapping):
            current[name] = renamed(value, fields, values)
        else:
            present = (values or {}).get(name, {})
            current[name] = present.get(value, value) if isinstance(value, str) else value
    return current
