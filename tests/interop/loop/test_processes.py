"""A training loop in two processes gives the influences of one process with the rollouts of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.loops import Loop
from helpers.ranks import run_on_ranks
from helpers.tolerances import assert_close_to_rounding


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2 without synchronisation"])
def test_ranks_have_the_influences_of_one_process(kind: str, tmp_path: Path) -> None:
    capture = Loop(1, 1, {"every": 1}).run()
    assert capture is not None
    [alone] = capture.history
    ranks = run_on_ranks(2, "ranks_loop.py", tmp_path, kind)
    for rank in ranks:
        assert len(rank["history"]) == 1
        # Gradients of the same rollouts in other orders, divided by moments that are as small.
        assert rank["history"][0]["measured"] == pytest.approx(alone["measured"], rel=1e-6)
        scale = float(rank["expected"]["per_sequence"].abs().sum())
        for name, expected in rank["expected"].items():
            actual = rank["actual"][name]
            assert_close_to_rounding(actual, expected, terms=1e4, scale=scale, dtype=torch.float64)
    assert ranks[0]["history"][0]["total"] == ranks[1]["history"][0]["total"]
