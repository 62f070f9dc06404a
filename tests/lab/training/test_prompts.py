"""Prompts that return over a training run, beside a loop over the ledger's entries."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.made_trainings import made_entry, write_made_ledger
from helpers.tolerances import assert_close_to_rounding

import fx_influence as fx
from fx_influence.interop.ledger.file import append_entry, read_ledger
from fx_influence.lab.training.prompts import returning_prompts


def test_returning_prompts_are_those_of_a_loop(tmp_path: Path) -> None:
    write_made_ledger(tmp_path, 12)
    appearances: dict[str, list[tuple[int, list[Any]]]] = defaultdict(list)
    for entry in read_ledger(tmp_path):
        for row in entry["prompts"]:
            appearances[row[0]].append((entry["step"], row))
    returning = returning_prompts(fx.load_training(tmp_path))
    assert {x.key for x in returning} == {key for key, rows in appearances.items() if len(rows) > 1}
    assert len(returning) == 16
    sizes = [abs(x.term.value) for x in returning]
    assert sizes == sorted(sizes, reverse=True)
    for series in returning:
        rows = appearances[series.key]
        assert series.steps.tolist() == [step for step, _ in rows]
        assert series.influence.tolist() == [row[1] for _, row in rows]
        assert series.reward.tolist() == [row[4] for _, row in rows]
        assert_close_to_rounding(series.term.value, sum(row[1] for _, row in rows), terms=len(rows))
        assert_close_to_rounding(series.term.stderr, math.hypot(*(row[2] for _, row in rows)), terms=10)


@pytest.mark.parametrize("field", ["prompts", "nothing"])
def test_ledger_without_returning_prompts_has_none(tmp_path: Path, field: str) -> None:
    """A ledger of before prompts were in it, and one whose prompts appear once."""
    entry = made_entry(1, np.random.default_rng(0), 0.8)
    append_entry(tmp_path, {name: value for name, value in entry.items() if name != field})
    assert returning_prompts(fx.load_training(tmp_path)) == []
