"""Names that version 0.1 stored, read under the present ones."""

from __future__ import annotations

from typing import Any

import pytest

from fx_influence.interop.runtime.renamed import PLAN_FIELDS, current_plan, current_summary, plan_notes


def test_current_summary_renames_nested_fields() -> None:
    stored = {"total": 2.0, "in_this_step": {"realised": 0.5, "realised_stderr": 0.1, "total": 0.4}}
    expected = {"total": 2.0, "in_this_step": {"measured": 0.5, "measured_stderr": 0.1, "total": 0.4}}
    assert current_summary({**stored, "evaluations": [stored]}) == {**expected, "evaluations": [expected]}
    assert current_summary(expected) == expected


@pytest.mark.parametrize(("old", "present"), [("share", "frozen"), ("marginal", "jacobian"), ("rmsprop", "rmsprop")])
def test_current_plan_renames_fields_and_values(old: str, present: str) -> None:
    assert current_plan({"gain": old, "seed": 3}, PLAN_FIELDS) == {"preconditioner": present, "seed": 3}


def test_current_plan_leaves_the_columns_of_prompts_alone() -> None:
    stored: dict[str, Any] = {"update": {"prompts": [{"prompt": "1+1=", "gain": "share"}]}}
    assert current_plan(stored, PLAN_FIELDS) == stored
    assert plan_notes(stored, PLAN_FIELDS) == []


def test_current_plan_leaves_a_name_that_has_no_place() -> None:
    """A Fisher plan never had the field, so it is refused there under the name that was given."""
    assert current_plan({"gain": "share", "preconditioner": "share"}, {}) == {
        "gain": "share",
        "preconditioner": "share",
    }


def test_current_plan_rejects_both_names_of_a_field() -> None:
    with pytest.raises(ValueError, match=r"gain is 'share' beside preconditioner, its present name; .*Remove gain"):
        current_plan({"gain": "share", "preconditioner": "frozen"}, PLAN_FIELDS)


def test_plan_notes_tell_the_present_name() -> None:
    stored = {"gain": "marginal", "seed": 3}
    assert plan_notes(stored, PLAN_FIELDS) == [
        "gain: marginal is called preconditioner: jacobian now; it is read as that"
    ]
    assert plan_notes(current_plan(stored, PLAN_FIELDS), PLAN_FIELDS) == []
