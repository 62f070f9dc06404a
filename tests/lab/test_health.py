"""Check each finding of a run's health on figures that pass and on figures that fail."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from helpers.run_results import LR, find_finding, make_results

from fx_influence.lab.health import Finding, health
from fx_influence.lab.health.noise import MAX_RANKING_NOISE


def test_health_is_good_for_a_sound_run() -> None:
    findings = health(make_results(run={"update_off_policy": 1e-5}))
    assert {finding.level for finding in findings} == {"good"}
    assert len({finding.name for finding in findings}) == len(findings) == 10


def test_health_tells_share_and_remedy_of_noise() -> None:
    noise = np.array([0.1] * 4 + [0.8] * 6)
    finding = find_finding("Standard errors of the rollouts", stderr=noise * np.array([1.0, 2.0] * 5))
    assert finding is not None
    assert finding.level == "attention"
    assert "E is too small: the 95% intervals of 60% of rollouts include 0." in finding.text
    # The median rollout has 2.3646 stderr / |influence| = 1.89: its square is how many more prompts bring it to 1.
    assert "About 3.6 times as many prompts in E" in finding.text


def test_signs_are_told_by_student_t() -> None:
    """A value needs 2.3646 standard errors with eight parts of E, and two with 61."""
    arrays = {"per_sequence": np.full(10, 2.2), "stderr": np.ones(10)}
    for parts, level in ((8, "attention"), (61, "good")):
        arrays["deviations"] = np.zeros((parts, 10))
        for name in ("Standard errors of the rollouts", "Sign of the total"):
            finding = find_finding(name, {"total": 2.2, "total_stderr": 1.0}, **arrays)
            assert finding is not None
            assert finding.level == level


def test_ranking_tells_how_many_prompts_would_do() -> None:
    # With a share s of noise in the squares, n times the prompts leave s / n of noise beside 1 - s of influence.
    stderr = np.full(10, np.sqrt(0.5 * 2.5))
    finding = find_finding("Ranking of the rollouts", stderr=stderr)
    assert finding is not None
    assert finding.level == "attention"
    assert "E is too small for a ranking: 50% of the influences' squares is noise" in finding.text
    times = float(re.findall(r"About (\S+) times", finding.text)[0])
    assert (0.5 / times) / (0.5 / times + 0.5) == pytest.approx(MAX_RANKING_NOISE, rel=0.05)


def test_ranking_names_no_number_when_all_is_noise() -> None:
    finding = find_finding("Ranking of the rollouts", stderr=np.full(10, 2.0))
    assert finding is not None
    assert "Many times as many prompts" in finding.text


def test_rollout_errors_leave_out_rollouts_that_move_nothing() -> None:
    arrays = {"per_sequence": np.array([1.0] * 2 + [0.0] * 8), "stderr": np.array([0.1] * 2 + [0.0] * 8)}
    finding = find_finding("Standard errors of the rollouts", **arrays)
    assert finding is not None
    assert finding.level == "good"
    assert "100% of rollouts" in finding.text


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"stderr": np.full(10, np.nan)}, "at least two prompts"),
        ({"per_sequence": np.zeros(10), "stderr": np.zeros(10)}, "every influence is zero"),
    ],
)
def test_rollout_errors_are_unknown_without_stderr_or_influence(arrays: dict[str, Any], words: str) -> None:
    finding = find_finding("Standard errors of the rollouts", **arrays)
    assert finding is not None
    assert finding.level == "unknown"
    assert words in finding.text


@pytest.mark.parametrize(
    ("name", "summary", "words"),
    [
        ("Sign of the total", {"total_stderr": 2.5}, "1.6 standard errors from zero"),
        ("First order", {"eta_trust": LR / 4}, "10% off at 0.25 of this step's length, so about 40% off"),
        ("Policy of E", {"off_policy": 0.2}, "another policy sampled E"),
        ("Unattributed", {"unattributed": 3.0}, "0.2 of the sum of |influence|"),
        ("Identity", {"residual": 15.0 * 3e-4}, "differ by 3.0e-04"),
        ("Predicted and measured", {"in_this_step": {"total": -4e-3, "measured": -2e-3}}, "100.0% apart"),
    ],
)
def test_health_needs_attention_when_beyond_bound(name: str, summary: dict[str, Any], words: str) -> None:
    finding = find_finding(name, summary)
    assert finding is not None
    assert finding.level == "attention"
    assert words in finding.text


def test_rounding_floor_counts_rollouts_below_it() -> None:
    arrays = {"per_sequence": np.array([1.0] * 8 + [-2.0] * 2)}
    for floor, level, words in ((1.5 * LR, "attention", "more than 80% of"), (0.5 * LR, "good", "100% of rollouts")):
        finding = find_finding("Rounding of the weights", {"rounding_floor": floor}, **arrays)
        assert finding is not None
        assert finding.level == level
        assert words in finding.text


@pytest.mark.parametrize(
    ("name", "summary"),
    [
        ("Unattributed", {"unattributed": 0.1}),
        ("Predicted and measured", {"in_this_step": {"total": -4e-3, "measured": -3.9e-3}}),
        ("Predicted and measured", {"in_this_step": {"total": -4e-3, "measured": -2e-3, "unexplained_stderr": 2e-3}}),
        ("First order", {"eta_trust": None}),
    ],
)
def test_health_is_good_when_within_bound(name: str, summary: dict[str, Any]) -> None:
    finding = find_finding(name, summary)
    assert finding is not None
    assert finding.level == "good"


def test_effective_sample_is_read_at_the_learning_rate() -> None:
    finding = find_finding("Effective sample size", ess=np.array([64.0, 10.0]))
    assert finding is not None
    assert finding.level == "attention"
    assert "leave 10 of 64 rollouts" in finding.text
    finding = find_finding("Effective sample size", ess=np.array([10.0, 64.0]))
    assert finding is not None
    assert finding.level == "good"
    finding = find_finding("Effective sample size", eta=np.array([0.5 * LR, 2 * LR]))
    assert finding is not None
    assert finding.level == "unknown"


def test_clipping_is_read_at_the_learning_rate() -> None:
    finding = find_finding("Clipped weights", full_clip_fraction=np.array([0.0, 0.25]))
    assert finding is not None
    assert finding.level == "attention"
    assert "25.0%" in finding.text


def test_identity_bound_depends_on_dtype() -> None:
    sizes = {"residual": 15.0 * 1e-6}
    for dtype, level in (("float32", "good"), ("float64", "attention")):
        finding = find_finding("Identity", sizes, dtype=dtype)
        assert finding is not None
        assert finding.level == level


def test_policy_of_u_tells_of_an_older_policy() -> None:
    finding = find_finding("Policy of U", None, {"update_off_policy": 0.3})
    assert finding is not None
    assert "older policy" in finding.text
    assert find_finding("Policy of U", None, {"update_off_policy": None}) is None


def test_health_leaves_out_what_a_training_does_not_store() -> None:
    lacking = ("eta_trust", "rounding_floor", "off_policy")
    stored = make_results(evaluation={"unattributed": 0.0, "in_this_step": {"total": -4e-3}})
    [evaluation] = stored.evaluations
    for name in lacking:
        del evaluation.summary[name]
    del evaluation.arrays["full_clip_fraction"]
    names = {finding.name for finding in health(stored)}
    assert names == {
        "Standard errors of the rollouts",
        "Ranking of the rollouts",
        "Sign of the total",
        "Effective sample size",
        "Unattributed",
        "Identity",
    }


def test_health_skips_step_length_when_lr_is_zero() -> None:
    names = {finding.name for finding in health(make_results(run={"lr": 0.0}))}
    assert {"First order", "Rounding of the weights"}.isdisjoint(names)


NO_MOVEMENT: dict[str, Any] = {"per_sequence": np.zeros(10), "stderr": np.zeros(10)}


def of_a_step_that_moves_nothing(advantages: list[float | None]) -> Finding | None:
    motionless = dataclasses.replace(
        make_results(**NO_MOVEMENT), sequences=[{"advantage": value} for value in advantages]
    )
    return next((finding for finding in health(motionless) if finding.name == "Nothing moved"), None)


def test_movement_names_missing_advantages() -> None:
    finding = of_a_step_that_moves_nothing([0.0] * 9 + [None])
    assert finding is not None
    assert finding.level == "attention"
    assert "every advantage is 0" in finding.text
    assert "sometimes solved and sometimes not" in finding.text


def test_movement_names_advantages_that_move_nothing() -> None:
    finding = of_a_step_that_moves_nothing([0.5, -0.5] * 5)
    assert finding is not None
    assert finding.level == "attention"
    assert "although rollouts have advantages" in finding.text


def test_movement_names_a_learning_rate_of_zero() -> None:
    finding = find_finding("Nothing moved", run={"lr": 0.0})
    assert finding is not None
    assert finding.level == "attention"
    assert "learning rate of this step is 0" in finding.text


def test_movement_is_left_out_when_one_rollout_moves() -> None:
    assert find_finding("Nothing moved", per_sequence=np.array([1.0] + [0.0] * 9)) is None


def test_sign_is_unknown_when_total_is_zero() -> None:
    finding = find_finding("Sign of the total", {"total": 0.0, "total_stderr": 0.0})
    assert finding is not None
    assert finding.level == "unknown"


def test_health_puts_attention_first() -> None:
    levels = [finding.level for finding in health(make_results({"off_policy": 0.2}, eta=np.zeros(0), ess=np.zeros(0)))]
    assert levels[:2] == ["attention", "unknown"]
    assert set(levels[2:]) == {"good"}


CONFIRMED: dict[str, Any] = {
    "agrees": True,
    "conclusive": True,
    "deviation": 1e-9,
    "bound": 1e-7,
    "gradient_deviation": 1e-16,
    "gradient_bound": 1e-9,
    "judged": 0.9,
    "parameters": [],
}


@pytest.mark.parametrize(
    ("figures", "level", "text"),
    [
        ({}, "good", "confirm the derivatives: 90%"),
        (
            {"conclusive": False, "judged": 0.2, "deviation": None, "bound": None},
            "unknown",
            "Only 20% .* nothing shows",
        ),
        (
            {"agrees": False, "deviation": 0.3, "parameters": ["a.w"]},
            "attention",
            r"differ by 0\.3 .* along 'a\.w'.*Repair",
        ),
        ({"agrees": False, "gradient_deviation": 0.4}, "attention", r"by 0\.4 .* all parameters together"),
        ({"agrees": False, "deviation": None}, "attention", r"differ by 1 of"),
    ],
)
def test_health_says_whether_derivatives_are_confirmed(figures: dict[str, Any], level: str, text: str) -> None:
    finding = find_finding("Derivatives", run={"derivative_check": {**CONFIRMED, **figures}})
    assert finding is not None
    assert finding.level == level
    assert re.search(text, finding.text)


def test_health_omits_derivatives_that_were_not_checked() -> None:
    assert find_finding("Derivatives") is None
    assert find_finding("Derivatives", run={"derivative_check": None}) is None
