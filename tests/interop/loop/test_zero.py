"""A training loop under DeepSpeed's ZeRO in two processes: measured as by one process, and never changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.loops import PROMPTS
from helpers.ranks import run_on_ranks
from helpers.sharded_results import assert_influences_of_one_process
from helpers.tolerances import TINY_POLICY, assert_within, exact_bound, rounding_bound

from fx_influence.estimators.stderr import MAX_RANDOM_GROUPS


@pytest.mark.extra
def test_ranks_under_zero_have_the_influences_of_one_process(tmp_path: Path) -> None:
    ranks = run_on_ranks(2, "ranks_loop_zero.py", tmp_path)
    for rank in ranks:
        for stage in ("1", "2", "3"):
            plain, measured = rank[stage]["plain"], rank[stage]["measured"]
            assert all(torch.equal(plain["weights"][name], x) for name, x in measured["weights"].items())
            assert measured["steps"] == 3
            assert [metrics["step"] for metrics in measured["history"]] == [1, 2, 3]
            assert measured["history"] == ranks[0][stage]["measured"]["history"]
            for metrics in measured["history"]:
                assert metrics["step_rounding"] <= rounding_bound(torch.float32, 1, 1e3)
            for actual, expected in zip(measured["actual"], measured["expected"], strict=True):
                scale = float(expected["float64"]["per_sequence"].abs().sum())
                for name, exact in expected["float64"].items():
                    bound = exact_bound(expected["float32"][name], exact, TINY_POLICY, torch.float32)
                    assert bound <= 1e-2 * scale, name
                    assert_within(actual[name], exact, bound, name)
        assert_directions_alone_are_gathered(rank)
        for stage, training in rank["bfloat16"].items():
            plain, measured = training["plain"], training["measured"]
            assert all(torch.equal(plain["weights"][name], x) for name, x in measured["weights"].items())
            assert {x.dtype for x in measured["weights"].values()} == {torch.bfloat16}
            assert measured["history"] == ranks[0]["bfloat16"][stage]["measured"]["history"]
            for metrics in measured["history"]:
                assert metrics["step_rounding"] <= rounding_bound(torch.float32, 1, 1e3) < metrics["forward_rounding"]
            assert len(training["records"]) == 2
            for record in training["records"]:
                assert_influences_of_one_process([record], torch.bfloat16, training["terms"])
        assert "1 of the model's weights are not those that DeepSpeed's optimizer moves" in rank["unrounded"]
        assert "Leave zero_hpz_partition_size" in rank["refusal"]


def assert_directions_alone_are_gathered(rank: dict[str, Any]) -> None:
    """Hold what a process gathers in a measured step to the flat vector of each group, once for each direction.

    These are gamma * grad H of each fold and of its fresh coordinates, the step, the step without each fold, and in
    bfloat16 the step once more, from which the rounding of the weights is told.
    """
    folds = min(PROMPTS, MAX_RANDOM_GROUPS)
    for stage in ("1", "2"):
        # The later steps in bfloat16 are compared with those of one process, for which the test gathers all.
        cases = ((rank[stage], 2 * folds + 2, 3), (rank["bfloat16"][stage], 2 * folds + 3, 1))
        for training, directions, steps in cases:
            gathered, padded = training["measured"]["gathered"][:steps], training["measured"]["padded"]
            assert [sorted(sizes) for sizes in gathered] == [sorted(padded * directions)] * steps
            assert not any(training["plain"]["gathered"])
