"""The benchmark of the controller: its verdict follows the criterion that its page states."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.evidence import bench_acting, bench_control
from benchmarks.evidence.training_runs import initial_policy, step_states


def interval(mean: float, half_width: float | None = 0.01) -> dict[str, float | None]:
    return {"mean": mean, "half_width": half_width}


def row(method: str, setting: float | None = None, **figures: Any) -> dict[str, Any]:
    """Return a method's figures: as plain GRPO's, at an entropy far below the target, at its cost."""
    plain = {"entropy": 0.27, "pass_1": 0.32, "pass_8": 0.85, "pass_1_more": 0.0, "pass_8_more": 0.0, "cost": 1.0}
    means = {name: interval(mean) for name, mean in plain.items()}
    return {"policy": "early", "method": method, "setting": setting, **means, **figures}


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
    rows = [row("grpo"), bonus, row(bench_control.CONTROL, 0.8, **figures)]
    assert bench_control.verdicts(rows) == {"early": verdict}


def test_control_is_entered_with_its_best_setting() -> None:
    worse = row(bench_control.CONTROL, 0.5, pass_8_more=interval(0.03), pass_1=interval(0.2))
    rows = [row("grpo"), worse, row(bench_control.CONTROL, 0.8)]
    assert bench_control.verdicts(rows) == {"early": "does not pay"}


def test_adaptive_bonus_rises_and_is_applied_below_the_target() -> None:
    training = bench_acting.TrainingRun("early", bench_control.ADAPTIVE, 0, 1e-4, 60, setting=0.25)
    bonus, target = bench_control.adaptive_bonus(training), bench_control.TARGETS["early"]
    entropies = [target + 0.1, *[target - 0.1] * 6, target + 0.1, target]
    assert [bonus(entropy) for entropy in entropies] == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 0.0, 0.75]


def test_steer_gives_its_weight_to_the_largest_effect() -> None:
    policy = initial_policy("demo", keep=False)
    step_state = next(iter(step_states(policy, 1e-4, 0, 1, 4, 4)))
    training = bench_acting.TrainingRun("demo", bench_control.STEER, 0, 1e-4, 1, setting=0.5)
    values = bench_acting.values_before(policy, step_state)
    weights = bench_control.steer_weights(training, policy, step_state, values)[step_state.batch.completion_mask]
    assert weights.min() == pytest.approx(0.5)
    assert weights.max() <= 1.0
    assert len(weights.unique()) > 2
