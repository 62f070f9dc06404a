"""The account of a training run: every sum beside a loop over the file's lines, its errors, and what is refused."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.made_trainings import made_entry, write_made_ledger
from helpers.tolerances import assert_close_to_rounding
from scipy.stats import t

import fx_influence as fx
from fx_influence.interop.ledger.file import LEDGER, append_entry
from fx_influence.interop.runtime.run_files import RunDirectoryError
from fx_influence.lab.training.account import account, causes, label_series, label_sums, lifetime, strongest_labels
from fx_influence.lab.training.prompts import returning_prompts

COUNT = 12


@pytest.fixture
def training(tmp_path: Path) -> fx.lab.Training:
    write_made_ledger(tmp_path, COUNT, every=5)
    return fx.load_training(tmp_path)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / LEDGER).read_text().splitlines()]


def close(actual: float, expected: float) -> None:
    assert_close_to_rounding(actual, expected, terms=10 * COUNT, scale=max(abs(expected), 1e-2))


def test_columns_are_those_of_the_file(training: fx.lab.Training) -> None:
    entries = lines(training.path)
    assert training.steps["step"].tolist() == [entry["step"] for entry in entries] == list(range(5, 61, 5))
    for name in entries[0]["figures"]:
        assert training.steps[name].tolist() == [entry["figures"][name] for entry in entries]
    assert np.isnan(training.steps["rounding"]).all()
    rows = [(e["step"], kind, row[0], row[1]) for e in entries for kind, rows in e["sums"].items() for row in rows]
    columns = (training.labels[name].tolist() for name in ("step", "kind", "label", "influence"))
    assert list(zip(*columns, strict=True)) == rows
    assert training.coverage == COUNT / 60
    assert training.kinds == ["region", "third", "end", "source"]
    assert len(training.table()) == COUNT
    assert len(training.label_table()) == len(rows)


def test_account_adds_up_the_lines(training: fx.lab.Training) -> None:
    sums: dict[str, float] = defaultdict(float)
    squares: dict[str, float] = defaultdict(float)
    for entry in lines(training.path):
        for name, value in entry["figures"].items():
            sums[name] += value
            squares[name] += value**2
    summed = account(training)
    close(summed.measured.value, sums["measured"])
    close(summed.predicted.value, sums["total"])
    close(summed.measured.stderr, math.sqrt(squares["measured_stderr"]))
    close(summed.predicted.stderr, math.sqrt(squares["stderr"]))
    terms = {term.name: term for term in summed.terms}
    assert list(terms) == ["rollouts", "momentum", "weight decay", "unattributed"]
    for name, term in terms.items():
        close(term.value, sums[name.replace(" ", "_")])
    close(terms["rollouts"].stderr, math.sqrt(squares["rollouts_stderr"]))
    assert math.isnan(terms["momentum"].stderr)
    assert not terms["momentum"].sign
    close(sum(term.value for term in summed.terms), summed.predicted.value)
    close(summed.unexplained.value, sums["measured"] - sums["total"])
    close(summed.unexplained.stderr, math.sqrt(squares["unexplained_stderr"]))
    assert not summed.bounded_steps
    assert (summed.num_steps, summed.coverage, summed.factor) == (COUNT, COUNT / 60, 1.0)


def test_error_of_the_difference_is_bounded_in_old_ledgers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for step in (1, 2):
        entry = made_entry(step, rng, 0.8)
        if step == 1:
            del entry["figures"]["unexplained_stderr"]
        append_entry(tmp_path, entry)
    summed, figures = account(fx.load_training(tmp_path)), entry["figures"]
    squares = 2 * figures["stderr"] ** 2 + figures["unexplained_stderr"] ** 2
    assert summed.bounded_steps == 1
    assert summed.unexplained.stderr == pytest.approx(math.sqrt(squares))


def test_intervals_take_the_degrees_of_every_step(tmp_path: Path) -> None:
    """One step has nearly all of the error, so a sum has its degrees; entries of older versions have six."""
    for step, scale in ((1, 1.0), (2, 1e-3)):
        entry = made_entry(step, np.random.default_rng(0), 0.8)
        entry["figures"] |= {"stderr": scale, "measured_stderr": scale, "degrees_of_freedom": 3.0}
        entry["sums"]["end"] = [["finished", 1.0, scale, 10, 1.0]]
        entry["prompts"] = [["0" * 12, 1.0, scale, 8, 0.5, ""]]
        append_entry(tmp_path, entry)
    summed = account(fx.load_training(tmp_path))
    [label], [prompt] = label_sums(fx.load_training(tmp_path), "end"), returning_prompts(fx.load_training(tmp_path))
    for term, degrees in ((summed.predicted, 3), (summed.measured, 15), (label.term, 3), (prompt.term, 3)):
        assert term.degrees_of_freedom == pytest.approx(degrees, rel=1e-5)
        assert term.half_width == pytest.approx(t.ppf(0.975, degrees), rel=1e-5)
    assert label.term.sign == 0, "2 is told by two standard errors, not by three degrees of freedom"
    older = [{**x, "figures": {k: v for k, v in x["figures"].items() if "degrees" not in k}} for x in lines(tmp_path)]
    for entry in older:
        append_entry(tmp_path / "older", entry)
    summed = account(fx.load_training(tmp_path / "older"))
    for term in (summed.predicted, summed.measured):
        assert term.degrees_of_freedom == pytest.approx(6, rel=1e-5)


def test_account_scales_only_where_asked(training: fx.lab.Training) -> None:
    plain, scaled = account(training), account(training, scale=True)
    close(scaled.measured.value, 5 * plain.measured.value)
    close(scaled.predicted.stderr, 5 * plain.predicted.stderr)
    close(scaled.terms[0].value, 5 * plain.terms[0].value)
    assert scaled.factor == 5
    for once, times in zip(label_sums(training, "region"), label_sums(training, "region", scale=True), strict=True):
        close(times.term.value, 5 * once.term.value)


def test_stderr_of_sums_covers_independent_draws() -> None:
    """Sums of independent draws spread by the root of the summed squares, here over 4,000 made runs."""
    errors = np.array([1.0, 2.0, 0.5])
    rng = np.random.default_rng(0)
    ends = (errors * rng.standard_normal((4000, 3))).sum(1)
    columns = {name: np.zeros(3) for name in ("total", "stderr", "rollouts", "rollouts_stderr")}
    columns |= {name: np.zeros(3) for name in ("momentum", "weight_decay", "unattributed", "measured")}
    columns |= {"step": np.array([1, 2, 3]), "measured_stderr": errors, "unexplained_stderr": errors}
    columns |= dict.fromkeys(("degrees_of_freedom", "measured_degrees_of_freedom"), np.full(3, 7.0))
    stderr = account(fx.lab.Training(Path(), columns, {}, [], {}, {})).measured.stderr
    # The standard deviation of 4,000 draws is known to 1 part in sqrt(8,000).
    assert abs(ends.std() / stderr - 1) < 5 / math.sqrt(8000)


def with_rewards(directory: Path, rewards: list[list[float]]) -> fx.lab.Training:
    """Return a training run whose steps have rollouts of these rewards, each of influence 1."""
    for step, values in enumerate(rewards, start=1):
        entry = made_entry(step, np.random.default_rng(0), 0.8)
        reward = torch.tensor(values)
        kinds = {"reward": fx.labels.reward_bands(reward)}
        if len(reward.unique()) <= 4:
            kinds["reward value"] = fx.labels.rewards(reward)
        for kind, chosen in kinds.items():
            counts = chosen.index.bincount(minlength=len(chosen.names)).tolist()
            rows = zip(chosen.names, counts, strict=True)
            entry["sums"][kind] = [[name, float(n), 0.1, n, n / len(values)] for name, n in rows if n]
        append_entry(directory, entry)
    return fx.load_training(directory)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([[0.0, 1.0, 1.0], [0.5, 1.0]], {"reward 0": 1, "reward 0.5": 1, "reward 1": 3}),
        (
            [[0.0, 0.1, 0.0147], [0.2, 0.3, 1.0, 0.0]],
            {"reward 0": 2, "reward between 0 and 1": 4, "reward 1": 1},
        ),
        ([[0.1, 0.2, 0.3, 0.4, -1.0], [2.0]], {"reward between 0 and 1": 4, "reward below 0": 1, "reward above 1": 1}),
    ],
    ids=["few in all", "few a step", "many a step"],
)
def test_rewards_are_few_kinds_that_add_up(
    rewards: list[list[float]], expected: dict[str, int], tmp_path: Path
) -> None:
    """Values of the reward where the run has four at most, else bands that are the same in every step."""
    training = with_rewards(tmp_path, rewards)
    assert training.kinds == ["region", "third", "end", "source", "reward"]
    sums = {x.term.name: x for x in label_sums(training, "reward")}
    assert {name: x.members for name, x in sums.items()} == expected
    assert {name: x.term.value for name, x in sums.items()} == expected


def test_labels_add_up_the_lines(training: fx.lab.Training) -> None:
    for kind in training.kinds:
        sums: dict[str, float] = defaultdict(float)
        squares: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        for entry in lines(training.path):
            for name, value, error, count, _ in entry["sums"][kind]:
                sums[name] += value
                squares[name] += math.nan if error is None else error**2
                counts[name] += count
        results = label_sums(training, kind)
        assert {x.term.name for x in results} == set(sums)
        assert [abs(x.term.value) for x in results] == sorted((abs(x.term.value) for x in results), reverse=True)
        for x in results:
            close(x.term.value, sums[x.term.name])
            assert (x.members, x.steps) == (counts[x.term.name], COUNT)
            if math.isnan(squares[x.term.name]):
                assert math.isnan(x.term.stderr)
                assert x.term.sign == 0
            else:
                close(x.term.stderr, math.sqrt(squares[x.term.name]))
            cumulative = label_series(training, kind)[x.term.name].cumulative()
            close(cumulative.values[-1], x.term.value)


def test_label_that_does_not_occur_adds_nothing(tmp_path: Path) -> None:
    for step, label in ((1, "a"), (2, "b"), (3, "a")):
        sums = {"source": [[label, 1.0, 0.5, 4, 1.0]]}
        append_entry(tmp_path, {"step": step, "figures": {}, "sums": sums})
    training = fx.load_training(tmp_path)
    series = label_series(training, "source")
    assert series["a"].cumulative().values.tolist() == [1.0, 1.0, 2.0]
    assert series["b"].cumulative().stderr.tolist() == [0.0, 0.5, 0.5]
    assert {x.term.name: x.steps for x in label_sums(training, "source")} == {"a": 2, "b": 1}


def test_strongest_labels_are_told_first(training: fx.lab.Training) -> None:
    results = strongest_labels(training)
    told = [bool(x.term.sign) for x in results]
    assert told == sorted(told, reverse=True)
    assert results[0].term.name == "finished"
    assert "source" not in {x.kind for x in results}


@pytest.mark.parametrize("kind", [None, "region", "end"])
def test_causes_add_up_to_the_total(training: fx.lab.Training, kind: str | None) -> None:
    parts = causes(training, kind)
    assert_close_to_rounding(sum(parts.values()), training.steps["total"], terms=100, scale=1e-3)
    assert ("A<0 unlikely" in parts) == (kind != "end")


def test_causes_name_what_no_label_has(tmp_path: Path) -> None:
    """A step without the kind leaves its rollouts to others, so that a stack never misses them."""
    write_made_ledger(tmp_path, 2)
    entry = made_entry(3, np.random.default_rng(1), 0.7)
    append_entry(tmp_path, {**entry, "sums": {}})
    training = fx.load_training(tmp_path)
    parts = causes(training)
    assert parts["other rollouts"][2] == training.steps["rollouts"][2]
    assert_close_to_rounding(sum(parts.values()), training.steps["total"], terms=100, scale=1e-3)


def test_lifetime_effects_are_those_of_the_lines(training: fx.lab.Training) -> None:
    """Beside a loop over the lines, with the errors of independent steps."""
    expected = realised = squares = 0.0
    regions: dict[str, float] = defaultdict(float)
    for entry in lines(training.path):
        figures = entry["figures"]
        factor = sum(0.9**k for k in range(entry["step"]))
        expected += factor * figures["rollouts"]
        squares += (factor * figures["rollouts_stderr"]) ** 2
        realised += figures["rollouts"] + figures["momentum"]
        for name, value, *_ in entry["sums"]["region"]:
            regions[name] += factor * value
    summed = lifetime(training)
    assert summed is not None
    close(summed.effects.value, expected)
    close(summed.effects.stderr, math.sqrt(squares))
    close(summed.realised.value, realised)
    close(summed.difference.value, expected - realised)
    for x in label_sums(training, "region", over_lifetime=True):
        close(x.term.value, regions[x.term.name])
    training.steps["lifetime_factor"][0] = np.nan
    assert lifetime(training) is None


def test_response_of_the_denominator_is_a_term(tmp_path: Path) -> None:
    entry = made_entry(1, np.random.default_rng(0), 0.8)
    entry["figures"]["total"] += 1e-4
    append_entry(tmp_path, {**entry, "preconditioner": "jacobian"})
    last = account(fx.load_training(tmp_path)).terms[-1]
    assert last.name == "response of the denominator"
    assert_close_to_rounding(last.value, 1e-4, terms=20, scale=1e-3, dtype=torch.float64)


def test_account_leaves_out_steps_without_a_measured_change(tmp_path: Path) -> None:
    for step in (1, 2):
        entry = made_entry(step, np.random.default_rng(step), 0.8)
        entry["figures"]["measured"] = None if step == 1 else -1.0
        append_entry(tmp_path, entry)
    training = fx.load_training(tmp_path)
    summed = account(training)
    assert (summed.num_steps, summed.measured.value) == (1, -1.0)
    assert summed.predicted.value == training.steps["total"][1]
    training.steps["measured"][:] = np.nan
    with pytest.raises(ValueError, match="measured is unknown in every step"):
        account(training)


def test_account_refuses_terms_of_another_step(tmp_path: Path) -> None:
    append_entry(tmp_path, {**made_entry(1, np.random.default_rng(0), 0.8), "preconditioner": "lifetime"})
    with pytest.raises(ValueError, match="preconditioner is 'lifetime'; expected 'frozen' or 'jacobian'"):
        account(fx.load_training(tmp_path))


def test_unknown_kind_is_refused(training: fx.lab.Training) -> None:
    with pytest.raises(ValueError, match="kind is 'colour'; expected one of region, third, end, source"):
        label_sums(training, "colour")


def test_empty_or_foreign_ledger_is_an_error(tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_text('{"step": 1')
    with pytest.raises(RunDirectoryError, match="expected at least one measured step"):
        fx.load_training(tmp_path)
    (tmp_path / LEDGER).write_text('{"step": 1}\n')
    with pytest.raises(RunDirectoryError, match="has entries of another form"):
        fx.load_training(tmp_path)
