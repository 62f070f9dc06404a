"""The benchmark of the controller: its verdict follows the criterion that its page states."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.evidence import bench_control


def interval(mean: float, half_width: float | None = 0.01) -> dict[str, float | None]:
    return {"mean": mean, "half_width": half_width}


def row(method: str, **figures: Any) -> dict[str, Any]:
    """Return a method's figures: as plain GRPO's, at an entropy far below the target, at its cost."""
    plain = {"entropy": 0.27, "pass_1": 0.32, "pass_8": 0.85, "pass_1_more": 0.0, "pass_8_more": 0.0, "cost": 1.0}
    means = {name: interval(mean) for name, mean in plain.items()}
    return {"policy": "early", "method": method, **means, **figures}


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ({}, "does not pay"),
        ({"pass_8_more": interval(0.03)}, "pays, by pass@8"),
        ({"pass_8_more": interval(0.03, 0.04)}, "does not pay"),
        ({"pass_8_more": interval(0.03, None)}, "does not pay"),
        ({"pass_8_more": interval(0.03), "pass_1_more": interval(-0.05)}, "does not pay"),
        ({"pass_8_more": interval(0.03), "cost": interval(1.7)}, "does not pay"),
        ({"entropy": interval(0.315)}, "pays, by the target"),
        ({"entropy": interval(0.315), "pass_1": interval(0.29)}, "does not pay"),
        ({"entropy": interval(0.315), "pass_8_more": interval(0.03)}, "pays, by pass@8 and the target"),
    ],
)
def test_verdict_follows_the_stated_criterion(figures: dict[str, Any], verdict: str) -> None:
    bonus = row("bonus", entropy=interval(0.32), pass_1=interval(0.30))
    rows = [row("grpo"), bonus, row(bench_control.CONTROL, **figures)]
    assert bench_control.verdicts(rows) == {"early": verdict}
