"""Assertions on training runs whose processes share model or optimizer, against runs and passes that share nothing."""

from __future__ import annotations

from typing import Any

import torch

from helpers.tolerances import TINY_POLICY, assert_within, exact_bound, rounding_bound
from helpers.trl_runs import PREFIX


def assert_training_unchanged(training: dict[str, Any]) -> None:
    plain, measured = training["plain"], training["measured"]
    assert plain["tensors"].keys() == measured["tensors"].keys()
    assert all(torch.equal(plain["tensors"][name], measured["tensors"][name]) for name in plain["tensors"])
    logged = [{name: x for name, x in e.items() if not name.startswith(PREFIX)} for e in measured["log"]]
    assert logged == plain["log"]


def assert_influences_of_one_process(
    records: list[dict[str, Any]], dtype: torch.dtype = torch.float32, terms: int = TINY_POLICY
) -> None:
    """Hold influences to those of one process in float64, and the trainer's gradient to that of the rollouts.

    Args:
        records: of ``compared_with_one_process``.
        dtype: of the trainer's own passes.
        terms: roundings on the way to its gradient.
    """
    [record] = records
    scale = float(record["float64"]["per_sequence"].abs().sum())
    # c is captured in float32.
    assert record["gradient"] <= rounding_bound(dtype, terms)
    for name, exact in record["float64"].items():
        bound = exact_bound(record["float32"][name], exact, TINY_POLICY, torch.float32)
        assert bound <= 1e-2 * scale, name
        assert_within(record["sharded"][name], exact, bound, name)


def assert_steps_foretold(history: list[dict[str, float]]) -> None:
    assert_steps_add_up(history)
    for metrics in history:
        assert (
            abs(metrics["measured"] - metrics["total"]) < 2 * metrics["unexplained_stderr"] <= 2.5 * metrics["stderr"]
        )


def assert_steps_add_up(
    history: list[dict[str, float]], dtype: torch.dtype = torch.float32, terms: int = TINY_POLICY
) -> None:
    """Hold the identity of two steps, their gradients to the trainer's, and their direction to the weights' change.

    Args:
        history: of the measured steps.
        dtype: of the trainer's own passes.
        terms: roundings on the way to its gradient.
    """
    assert [metrics["step"] for metrics in history] == [1, 2]
    for metrics in history:
        size = sum(abs(metrics[name]) for name in ("momentum", "rollouts", "self_influence", "stderr"))
        assert abs(metrics["residual"]) <= rounding_bound(torch.float32, TINY_POLICY, size)
        assert abs(metrics["unattributed"]) <= rounding_bound(dtype, terms, size)
        # theta' - theta of weights up to a thousand times as large.
        assert metrics["step_rounding"] <= rounding_bound(torch.float32, 1, 1e3)


def assert_measured_in_bfloat16(training: dict[str, Any], on_ranks: list[dict[str, Any]], full: bool) -> None:
    """Hold each rank's training, history and forward roundings; with ``full`` weights the influences as well."""
    assert training["dtypes"] == {"torch.bfloat16"}
    assert len(training["warnings"]) == 1
    for each in on_ranks:
        assert_training_unchanged(each)
        assert_steps_add_up(each["history"], torch.bfloat16, training["terms"])
        assert each["history"] == training["history"]
        for metrics, expected in zip(each["history"], each["forward_roundings"], strict=True):
            bound = rounding_bound(torch.float32, TINY_POLICY, expected)
            assert abs(metrics["forward_rounding"] - expected) <= bound
            assert expected > 1e-3
        if full:
            assert_influences_of_one_process(each["records"], torch.bfloat16, training["terms"])
