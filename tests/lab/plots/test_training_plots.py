"""Figures of a training run: the drawn values are those of the ledger; hostile names are drawn literally."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from helpers.made_trainings import made_entry, write_made_ledger
from helpers.tolerances import assert_close_to_rounding
from matplotlib.figure import Figure

import fx_influence as fx
from fx_influence.interop.ledger.file import append_entry
from fx_influence.lab import plots as plot
from fx_influence.lab.training.account import label_series


@pytest.fixture
def training(tmp_path: Path) -> fx.lab.Training:
    write_made_ledger(tmp_path, 12, every=2)
    return fx.load_training(tmp_path)


def lines(figure: Figure, axes: int = 0) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[axes].lines}


def texts(figure: Figure) -> list[str]:
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_ledger_draws_the_sums_of_the_steps(training: fx.lab.Training) -> None:
    drawn = plot.ledger(training)
    by_label = lines(drawn)
    assert_close_to_rounding(by_label["predicted, ±1 std. error"][:-1], training.steps["total"].cumsum(), terms=20)
    assert_close_to_rounding(by_label["measured"][:-1], training.steps["measured"].cumsum(), terms=20)
    # Stacks above and below 0 end where the predicted sum is.
    filled = [c for c in drawn.axes[0].collections if c.get_alpha() is None and len(c.get_paths())]
    ends = [x for c in filled if (x := np.asarray(c.get_paths()[0].vertices)[:, 1]).size]
    lowest, highest = min(x.min() for x in ends), max(x.max() for x in ends)
    assert_close_to_rounding(lowest + highest, training.steps["total"].sum(), terms=1000, scale=0.01)
    assert any("50% of the steps" in text for text in texts(drawn))


def test_label_sums_are_drawn_with_their_labels(training: fx.lab.Training) -> None:
    by_label = lines(plot.label_sums(training, "end"))
    for name, series in label_series(training, "end").items():
        assert_close_to_rounding(by_label[name][:-1], series.values.cumsum(), terms=20)


def test_timeline_lays_the_changes_over_the_entropy(training: fx.lab.Training) -> None:
    """The level is that at which the entropies before the steps differ from the measured changes by 0 on average."""
    drawn = plot.timeline(training)
    by_label, steps = lines(drawn), training.steps
    assert by_label["entropy on E before the step"].tolist() == steps["entropy"].tolist()
    drawn_lines = {
        name: by_label[f"{name} changes summed up, level fitted, 50% of the steps"]
        for name in ("predicted", "measured")
    }
    for name, column in (("predicted", "total"), ("measured", "measured")):
        expected = drawn_lines["measured"][0] + np.append(0.0, steps[column]).cumsum()
        assert_close_to_rounding(drawn_lines[name], expected, terms=20)
    differences = (steps["entropy"] - drawn_lines["measured"][:-1]).sum()
    assert_close_to_rounding(differences, 0.0, terms=100, scale=np.abs(steps["entropy"]).max())


@pytest.mark.parametrize("name", ["ledger", "timeline", "health_over_steps"])
@pytest.mark.parametrize("count", [1, 2, 70])
def test_figures_of_any_number_of_steps_have_labels(tmp_path: Path, name: str, count: int) -> None:
    write_made_ledger(tmp_path, count)
    drawn = getattr(plot, name)(fx.load_training(tmp_path))
    assert any("optimizer step" in text for text in texts(drawn))


def test_hostile_names_are_drawn_literally(tmp_path: Path) -> None:
    entry = made_entry(1, np.random.default_rng(0), 0.8)
    entry["sums"]["$x^2$/../<b>"] = [["$\\frac{1}{0}$\u202e", -1e-3, 1e-5, 4, 0.5]]
    append_entry(tmp_path, entry)
    training = fx.load_training(tmp_path)
    assert "$\\frac{1}{0}$\\u202e" in texts(plot.label_sums(training, "$x^2$/../<b>"))
    plot.ledger(training, "$x^2$/../<b>").canvas.draw()
