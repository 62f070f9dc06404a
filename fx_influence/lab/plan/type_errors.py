"""Say what was wrong with the type of a plan's field."""

from __future__ import annotations

import re

from pydantic import ValidationError

from fx_influence.lab.plan.batch_request import (
    REQUEST_KINDS,
)
from fx_influence.lab.plan.errors import PlanError, did_you_mean, refusal

EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "tuple": "a list",
    "dict": "an object",
}
"""What a value of pydantic's kinds of error should have been."""


def first_type_error(name: str, error: ValidationError) -> PlanError:
    bad = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
    # Between the field and what is wrong in it stands the kind of request, which the file does not name.
    parts = [part for part in bad["loc"] if part not in REQUEST_KINDS]
    where = name + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    value, context = bad["input"], bad.get("ctx", {})
    if bad["type"] == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"])
        return refusal(where, value, f"one of {', '.join(names)}", did_you_mean(str(value), names))
    if bad["type"] in ("missing", "too_long"):
        return refusal(name, list(bad["input"]), "two numbers, below and above")
    expected = EXPECTED.get(bad["type"].partition("_")[0], str(context.get("error", bad["msg"])))
    remedy = "Quote it." if expected == "a text" and not isinstance(value, (list, dict)) else ""
    remedy = f"Put it into [ ]: [{value}]" if expected == "a list" and isinstance(value, (str, int, float)) else remedy
    return refusal(where, value, expected, "Give one, or leave the line out." if value is None else remedy)
