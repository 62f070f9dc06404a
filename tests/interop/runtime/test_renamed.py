"""Names that version 0.1 stored, read under the present ones."""

from __future__ import annotations

from fx_influence.interop.runtime.renamed import PLAN_FIELDS, PLAN_VALUES, SUMMARY_FIELDS, renamed


def test_renamed_translates_nested_summary_fields() -> None:
    stored = {"total": 2.0, "in_this_step": {"realised": 0.5, "realised_stderr": 0.1, "total": 0.4}}
    expected = {"total": 2.0, "in_this_step": {"measured": 0.5, "measured_stderr": 0.1, "total": 0.4}}
    assert renamed(stored, SUMMARY_FIELDS) == expected
    assert renamed(expected, SUMMARY_FIELDS) == expected


def test_renamed_translates_plan_values() -> None:
    stored, present = {"gain": "marginal", "seed": 3}, {"preconditioner": "jacobian", "seed": 3}
    assert renamed(stored, PLAN_FIELDS, PLAN_VALUES) == present
