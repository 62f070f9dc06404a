"""Sentences and checks of a training run: a sign only where the error bars tell it, no word against a check."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.made_trainings import write_made_ledger

import fx_influence as fx
from fx_influence.lab.health import Finding
from fx_influence.lab.training.account import account
from fx_influence.lab.training.health import CHECKS, training_health
from fx_influence.lab.training.sentences import training_sentences

DIRECTIONS = re.compile(r"\b(raised|lowered|rose|fell)\b")


def made(directory: Path, **columns: Any) -> fx.lab.Training:
    """Return a made training run of 20 steps with other values in some columns."""
    write_made_ledger(directory, 20)
    training = fx.load_training(directory)
    for name, values in columns.items():
        training.steps[name][:] = values
    return training


def finding(training: fx.lab.Training, name: str) -> Finding:
    [chosen] = [x for x in training_health(training) if x.name == name]
    return chosen


def test_sentences_name_what_is_told(tmp_path: Path) -> None:
    training = made(tmp_path)
    sentences = training_sentences(training)
    assert len(sentences) == 3
    assert sentences[0].startswith("The 20 measured steps lowered the policy's entropy by 0.01")
    assert "came through momentum" in sentences[1]
    assert "likely tokens with a negative advantage lowered it most, by 0.00" in sentences[1]
    assert "Unexplained, measured minus predicted" in sentences[2]
    assert not [text for text in sentences if "told" in text]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [0.5, 1.9, 2.1, 30.0])
def test_direction_of_the_change_needs_two_errors(tmp_path: Path, size: float, sign: int) -> None:
    """The sum of 20 steps with errors of 1e-3 has an error of 1e-3 sqrt(20)."""
    error = 1e-3 * np.sqrt(20)
    value = sign * size * error / 20
    training = made(tmp_path, measured=value, total=value, measured_stderr=1e-3, stderr=1e-3)
    first = training_sentences(training)[0]
    words = DIRECTIONS.findall(first)
    if size > 2:
        assert words == ["raised" if sign > 0 else "lowered"]
    else:
        assert first.startswith("The error bars do not tell whether the 20 measured steps raised or lowered")
        assert f"{'+' if sign > 0 else '−'}{size * error:.4f}" in first


def test_step_with_most_of_the_error_is_named(tmp_path: Path) -> None:
    """The first step of AdamW without warm-up is such a step; 0.9 of 0.9 + 19 x 0.001 are its."""
    errors = np.full(20, np.sqrt(1e-3))
    training = made(tmp_path, measured_stderr=errors)
    assert "squared error" not in training_sentences(training)[0]
    errors[6] = np.sqrt(0.9)
    training = made(tmp_path, measured_stderr=errors)
    assert training_sentences(training)[0].endswith(" Step 7 alone has 98% of the squared error.")


def test_error_of_the_difference_decides_what_is_unexplained(tmp_path: Path) -> None:
    """The errors of both cancel in the difference; where only these are known, the sentence says so."""
    columns = {"measured": -1.1e-3, "total": -1e-3, "measured_stderr": 1e-3, "stderr": 1e-3}
    third = training_sentences(made(tmp_path, **columns, unexplained_stderr=1e-5))[2]
    assert third.startswith(
        "Unexplained, measured minus predicted, are −0.002000 ± 0.000045 nats, with a 95% interval that ex"
    )
    third = training_sentences(made(tmp_path, **columns, unexplained_stderr=np.nan))[2]
    assert "are −0.0020 ± 0.0063 nats, with a 95% interval that includes 0, from an upper bound" in third


def test_first_order_is_doubted_beyond_the_error_alone(tmp_path: Path) -> None:
    columns = {"measured": -1.2e-3, "total": -1e-3}
    assert finding(made(tmp_path, **columns, unexplained_stderr=1e-5), "First order").level == "attention"
    assert finding(made(tmp_path, **columns, unexplained_stderr=1e-3), "First order").level == "good"


def test_step_with_most_of_the_predicted_error_is_named(tmp_path: Path) -> None:
    errors = np.full(20, 1e-6)
    errors[0] = 1.0
    first = training_sentences(made(tmp_path, stderr=errors))[0]
    assert first.endswith("a sign that its error bar does not tell. Step 1 alone has 100% of the squared error.")


def test_change_without_an_error_has_no_direction(tmp_path: Path) -> None:
    training = made(tmp_path, measured_stderr=np.nan, stderr=np.nan)
    assert training_sentences(training)[0].startswith("The error bars do not tell")
    assert finding(training, "Sign of the change").level == "unknown"


def test_contradicting_first_order_comes_first(tmp_path: Path) -> None:
    training = made(tmp_path, measured=-1e-3, total=1e-3)
    first = training_sentences(training)[0]
    assert first.startswith("The first order does not hold over this run: the 20 measured steps lowered")
    assert finding(training, "First order").level == "attention"


def test_kinds_without_errors_have_no_direction(tmp_path: Path) -> None:
    training = made(tmp_path)
    training.labels["stderr"][:] = np.nan
    second = training_sentences(training)[1]
    assert "none has a sum whose sign the error bars tell" in second
    assert not DIRECTIONS.findall(second)


def test_kinds_are_named_in_both_directions(tmp_path: Path) -> None:
    """Kinds cancel: the strongest alone would not say where their sum comes from."""
    training = made(tmp_path)
    columns = training.labels
    columns["influence"][(columns["kind"] == "region") & (columns["label"] == "A>0 likely")] *= -1
    second = training_sentences(training)[1]
    assert "likely tokens with a negative advantage lowered it most, by 0.00" in second
    assert " and likely tokens with a positive advantage raised it most, by 0.00" in second


def test_term_without_an_error_has_no_more_digits_than_others(tmp_path: Path) -> None:
    training = made(tmp_path, stderr=1e-2, rollouts_stderr=1e-2)
    second = training_sentences(training)[1]
    [momentum] = re.findall(r"−(\S+) came through momentum", second)
    [rollouts, error] = re.findall(r"−(\S+) ± (\S+) from the rollouts", second)[0]
    assert len(momentum) == len(rollouts) == len(error)


def test_doubt_comes_before_the_figures(tmp_path: Path) -> None:
    training = made(tmp_path, residual=1e-3)
    assert training_sentences(training)[0].startswith("Do not trust these figures (Identity). ")
    assert finding(training, "Identity").level == "attention"


def test_other_preconditioners_have_no_account(tmp_path: Path) -> None:
    training = made(tmp_path)
    training.settings["preconditioner"] = "lifetime"
    sentences = training_sentences(training)
    assert len(sentences) == 3
    assert "there is no account beside the measured change" in sentences[0]
    assert not [text for text in sentences if "nats per token as measured" in text]


def test_sentences_tell_how_many_steps_are_covered(tmp_path: Path) -> None:
    write_made_ledger(tmp_path, 4, every=10)
    assert "The 4 measured steps of 40 (10%) lowered" in training_sentences(fx.load_training(tmp_path))[0]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("Rounding of the influences", {"rounding": 5e-4}),
        ("Rounding of the weights", {"step_rounding": 0.9}),
        ("Unattributed", {"unattributed": 1e-4}),
        ("Conditioning", {"conditioning": 0.9}),
        ("Effective sample size", {"ess": 3.0}),
        ("Sign of the change", {"stderr": 1.0}),
        ("Nothing moved", {"absolute": 0.0}),
        ("First order", {"measured": -1e-4}),
    ],
)
def test_check_finds_the_steps_that_fail(tmp_path: Path, name: str, columns: dict[str, float]) -> None:
    sound = made(tmp_path / "sound")
    assert name not in {x.name for x in training_health(sound) if x.level == "attention"}
    failing = made(tmp_path / "failing", **columns)
    assert finding(failing, name).level == "attention"
    assert name in training_sentences(failing)[2]


def test_check_names_the_first_step_that_fails(tmp_path: Path) -> None:
    training = made(tmp_path)
    training.steps["conditioning"][6:8] = 0.8
    assert "more than 0.5 in 2 of 20 measured steps, first in step 7" in finding(training, "Conditioning").text


@pytest.mark.parametrize(("pace", "level"), [(-1e-2, "attention"), (-1e-4, "good"), (1e-2, "good")])
def test_pace_tells_when_the_entropy_is_used_up(tmp_path: Path, pace: float, level: str) -> None:
    training = made(tmp_path, measured=pace, entropy=1.0)
    pace_found = finding(training, "Pace")
    assert pace_found.level == level
    if pace == -1e-2:
        assert "1 nats are used up in 100 steps" in pace_found.text
        lowest = min(account(training).terms, key=lambda term: term.value)
        assert f"Of the run's terms {lowest.name} lowers it most" in pace_found.text


def test_checks_without_figures_are_left_out(tmp_path: Path) -> None:
    training = made(tmp_path)
    for name in training.steps:
        if name != "step":
            training.steps[name][:] = np.nan
    names = {x.name for check in CHECKS if (x := check(training)) is not None}
    assert names == {"Sign of the change"}
