"""What the health of a run says, and when: each check on figures made to pass and to fail it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fx_influence.lab.health import RANKED, Finding, health
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.results import EntropyInfluenceResults, EvaluationResults

LR = 1e-3
SOUND: dict[str, Any] = {
    "total": -4.0,
    "total_stderr": 0.5,
    "residual": 1e-7,
    "eta_trust": 1.0,
    "rounding_floor": 1e-9,
    "off_policy": 1e-5,
    "rollouts": 64,
}


def results(
    own: dict[str, Any] | None = None, run: dict[str, Any] | None = None, dtype: str = "auto", **arrays: Any
) -> EntropyInfluenceResults:
    """Ten rollouts, all sure, and a step at half and at the whole learning rate."""
    found = {
        "per_sequence": np.array([1.0, -2.0] * 5),
        "stderr": np.full(10, 0.1),
        "eta": np.array([0.5 * LR, LR]),
        "ess": np.array([64.0, 60.0]),
        "full_clip_fraction": np.array([0.0, 0.0]),
    }
    summary = {**SOUND, **(own or {})}
    evaluation = EvaluationResults({**found, **arrays}, None, summary, [])
    plan = dataclasses.replace(EntropyInfluencePlan(), dtype=dtype)
    run = {**summary, "lr": LR, **(run or {})}
    return EntropyInfluenceResults(Path("run"), plan, {}, run, [], [], {}, (evaluation,))


def found(name: str, *arguments: Any, **more: Any) -> Finding | None:
    return next((finding for finding in health(results(*arguments, **more)) if finding.name == name), None)


def test_a_sound_run_is_fine_in_every_respect() -> None:
    findings = health(results(run={"update_off_policy": 1e-5}))
    assert {finding.level for finding in findings} == {"good"}
    assert len({finding.name for finding in findings}) == len(findings) == 10


def test_noise_is_told_with_its_share_and_its_remedy() -> None:
    noise = np.array([0.1] * 4 + [0.8] * 6)
    finding = found("Standard errors of the rollouts", stderr=noise * np.array([1.0, 2.0] * 5))
    assert finding is not None
    assert finding.level == "attention"
    assert "E is too small: 60% of rollouts are within two standard errors of zero." in finding.text
    # The median rollout has 2 stderr / |influence| = 1.6: its square is how many more prompts bring it to 1.
    assert "About 2.6 times as many prompts in E" in finding.text


def test_an_e_too_small_for_a_ranking_says_how_many_prompts_would_do() -> None:
    # With a share s of noise in the squares, n times the prompts leave s / n of noise beside 1 - s of influence.
    stderr = np.full(10, np.sqrt(0.5 * 2.5))
    finding = found("Ranking of the rollouts", stderr=stderr)
    assert finding is not None
    assert finding.level == "attention"
    assert "E is too small for a ranking: 50% of the influences' squares is noise" in finding.text
    times = float(re.findall(r"About (\S+) times", finding.text)[0])
    assert (0.5 / times) / (0.5 / times + 0.5) == pytest.approx(RANKED, rel=0.05)


def test_where_all_is_noise_no_number_of_prompts_is_made_up() -> None:
    finding = found("Ranking of the rollouts", stderr=np.full(10, 2.0))
    assert finding is not None
    assert "Many times as many prompts" in finding.text


def test_rollouts_that_move_nothing_do_not_count_as_noise() -> None:
    arrays = {"per_sequence": np.array([1.0] * 2 + [0.0] * 8), "stderr": np.array([0.1] * 2 + [0.0] * 8)}
    finding = found("Standard errors of the rollouts", **arrays)
    assert finding is not None
    assert finding.level == "good"
    assert finding.text.startswith("100% of rollouts")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"stderr": np.full(10, np.nan)}, "at least two prompts"),
        ({"per_sequence": np.zeros(10), "stderr": np.zeros(10)}, "every influence is zero"),
    ],
)
def test_without_error_bars_or_influence_noise_is_unknown(arrays: dict[str, Any], words: str) -> None:
    finding = found("Standard errors of the rollouts", **arrays)
    assert finding is not None
    assert finding.level == "unknown"
    assert words in finding.text


@pytest.mark.parametrize(
    ("name", "own", "words"),
    [
        ("Sign of the total", {"total_stderr": 2.5}, "1.6 standard errors from zero"),
        ("First order", {"eta_trust": LR / 4}, "10% off at 0.25 of this step's length, so about 40% off"),
        ("Policy of E", {"off_policy": 0.2}, "another policy sampled E"),
        ("Unattributed", {"unattributed": 3.0}, "0.2 of the sum of |influence|"),
        ("Identity", {"residual": 15.0 * 3e-4}, "differ by 3.0e-04"),
        ("Foretold and realised", {"in_this_step": {"total": -4e-3, "realised": -2e-3}}, "100.0% apart"),
    ],
)
def test_a_figure_beyond_its_bound_needs_attention(name: str, own: dict[str, Any], words: str) -> None:
    finding = found(name, own)
    assert finding is not None
    assert finding.level == "attention"
    assert words in finding.text


def test_rollouts_below_the_rounding_are_counted() -> None:
    arrays = {"per_sequence": np.array([1.0] * 8 + [-2.0] * 2)}
    for floor, level, words in ((1.5 * LR, "attention", "more than 80% of"), (0.5 * LR, "good", "100% of rollouts")):
        finding = found("Rounding of the weights", {"rounding_floor": floor}, **arrays)
        assert finding is not None
        assert finding.level == level
        assert words in finding.text


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("Unattributed", {"unattributed": 0.1}),
        ("Foretold and realised", {"in_this_step": {"total": -4e-3, "realised": -3.9e-3}}),
        ("First order", {"eta_trust": None}),
    ],
)
def test_a_figure_within_its_bound_is_fine(name: str, own: dict[str, Any]) -> None:
    finding = found(name, own)
    assert finding is not None
    assert finding.level == "good"


def test_the_effective_sample_is_that_of_this_steps_length() -> None:
    finding = found("Effective sample size", ess=np.array([64.0, 10.0]))
    assert finding is not None
    assert finding.level == "attention"
    assert "leave 10 of 64 rollouts" in finding.text
    finding = found("Effective sample size", ess=np.array([10.0, 64.0]))
    assert finding is not None
    assert finding.level == "good"
    finding = found("Effective sample size", eta=np.array([0.5 * LR, 2 * LR]))
    assert finding is not None
    assert finding.level == "unknown"


def test_clipped_weights_are_counted_at_this_steps_length() -> None:
    finding = found("Clipped weights", full_clip_fraction=np.array([0.0, 0.25]))
    assert finding is not None
    assert finding.level == "attention"
    assert "25.0%" in finding.text


def test_the_identity_is_held_to_what_its_precision_allows() -> None:
    sizes = {"residual": 15.0 * 1e-6}
    for dtype, level in (("float32", "good"), ("float64", "attention")):
        finding = found("Identity", sizes, dtype=dtype)
        assert finding is not None
        assert finding.level == level


def test_an_older_policy_of_u_is_mentioned() -> None:
    finding = found("Policy of U", None, {"update_off_policy": 0.3})
    assert finding is not None
    assert "older policy" in finding.text
    assert found("Policy of U", None, {"update_off_policy": None}) is None


def test_what_a_step_of_a_training_does_not_store_is_left_out() -> None:
    lacking = ("eta_trust", "rounding_floor", "off_policy")
    stored = results(own={"unattributed": 0.0, "in_this_step": {"total": -4e-3}})
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


def test_a_warm_up_step_without_a_learning_rate_says_nothing_of_its_length() -> None:
    names = {finding.name for finding in health(results(run={"lr": 0.0}))}
    assert {"First order", "Rounding of the weights"}.isdisjoint(names)


NO_MOVEMENT = {"per_sequence": np.zeros(10), "stderr": np.zeros(10)}


def of_a_step_that_moves_nothing(advantages: list[float | None]) -> Finding | None:
    still = dataclasses.replace(results(**NO_MOVEMENT), sequences=[{"advantage": value} for value in advantages])
    return next((finding for finding in health(still) if finding.name == "Nothing moved"), None)


def test_health_names_a_step_without_advantages() -> None:
    finding = of_a_step_that_moves_nothing([0.0] * 9 + [None])
    assert finding is not None
    assert finding.level == "attention"
    assert "every advantage is 0" in finding.text
    assert "sometimes solved and sometimes not" in finding.text


def test_health_names_advantages_that_move_nothing() -> None:
    finding = of_a_step_that_moves_nothing([0.5, -0.5] * 5)
    assert finding is not None
    assert finding.level == "attention"
    assert "although rollouts have advantages" in finding.text


def test_health_names_a_learning_rate_of_zero() -> None:
    finding = found("Nothing moved", run={"lr": 0.0})
    assert finding is not None
    assert finding.level == "attention"
    assert "learning rate of this step is 0" in finding.text


def test_health_says_nothing_of_movement_when_one_rollout_moves() -> None:
    assert found("Nothing moved", per_sequence=np.array([1.0] + [0.0] * 9)) is None


def test_a_total_of_zero_has_no_sign() -> None:
    finding = found("Sign of the total", {"total": 0.0, "total_stderr": 0.0})
    assert finding is not None
    assert finding.level == "unknown"


def test_what_needs_attention_comes_first() -> None:
    levels = [finding.level for finding in health(results({"off_policy": 0.2}, eta=np.zeros(0), ess=np.zeros(0)))]
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
            r"differ by 0\.3 .* along 'a\.w'.*Mend",
        ),
        ({"agrees": False, "gradient_deviation": 0.4}, "attention", r"by 0\.4 .* all parameters together"),
        ({"agrees": False, "deviation": None}, "attention", r"differ by 1 of"),
    ],
)
def test_health_says_whether_derivatives_are_confirmed(figures: dict[str, Any], level: str, text: str) -> None:
    finding = found("Derivatives", run={"derivative_check": {**CONFIRMED, **figures}})
    assert finding is not None
    assert finding.level == level
    assert re.search(text, finding.text)


def test_health_leaves_out_derivatives_of_a_run_without_the_check() -> None:
    assert found("Derivatives") is None
    assert found("Derivatives", run={"derivative_check": None}) is None
