"""Figures: values, labels and units; reproducible bytes; hostile text drawn literally."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from helpers.present import present
from helpers.synthetic_runs import PROMPT, synthetic_run
from matplotlib.figure import Figure

from fx_influence.estimators.stderr import cluster_stderr
from fx_influence.lab import plots as plot
from fx_influence.lab.plots.style import DIVERGING, drawable, save
from fx_influence.lab.results import EntropyInfluenceResults
from fx_influence.lab.waterfall import waterfall_columns

FIGURES = ("waterfall", "distribution", "correlates", "token_correlates", "eta_sweep", "matrix", "concentration")


def training_step(path: Path) -> EntropyInfluenceResults:
    """Return a run as ``interop.trl`` stores it: no matrix, no finite step but the trainer's, no gradient norms."""
    run = synthetic_run(path)
    arrays = {name: run.evaluations[0].arrays[name] for name in ("per_sequence", "per_token", "stderr")}
    arrays |= {"eta": np.array([1e-3]), "full": np.array([-1e-3]), "full_stderr": np.array([1e-4])}
    evaluation = dataclasses.replace(run.evaluations[0], arrays=arrays, matrix=None)
    sequences = [{**record, "gradient_norm": None} for record in run.sequences]
    summary = {k: v for k, v in run.summary.items() if k != "reference_lr"}
    return dataclasses.replace(run, evaluations=(evaluation,), sequences=sequences, summary=summary)


def texts(figure: Figure) -> list[str]:
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


@pytest.mark.parametrize("name", FIGURES)
def test_figure_has_labels_and_a_unit(tmp_path: Path, name: str) -> None:
    figure = getattr(plot, name)(synthetic_run(tmp_path))
    assert isinstance(figure, Figure)
    assert any("nats" in text or "%" in text for text in texts(figure))
    assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes)


def test_waterfall_columns_add_up_to_the_total(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    for by in ("advantage", "prompt"):
        columns = waterfall_columns(run, by=by)
        assert [c.name for c in columns[:2]] + [columns[-1].name] == ["momentum", "weight decay", "total"]
        assert sum(c.value for c in columns[:-1]) == pytest.approx(columns[-1].value)
        bars: Any = plot.waterfall(run, by=by).axes[0].patches
        assert [bar.get_height() for bar in bars] == pytest.approx([c.value for c in columns])
        ends = np.cumsum([c.value for c in columns[:-1]])
        assert [bar.get_y() for bar in bars[1:-1]] == pytest.approx(ends[:-1])
        assert bars[-1].get_y() == 0
    summary = run.evaluations[0].summary
    more = {**summary, "total": summary["total"] + 0.75, "unattributed": 0.75}
    changed = dataclasses.replace(run, evaluations=(dataclasses.replace(run.evaluations[0], summary=more),))
    columns = waterfall_columns(changed)
    assert columns[-2].name == "unattributed"
    assert sum(c.value for c in columns[:-1]) == pytest.approx(columns[-1].value)
    with pytest.raises(ValueError, match="by is 'reward'; expected 'advantage' or 'prompt'"):
        plot.waterfall(run, by="reward")


def test_waterfall_group_error_is_clustered_by_prompt_of_e(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    advantage = np.array([r["advantage"] for r in run.sequences])
    logprob = np.array([r["mean_logprob"] for r in run.sequences])
    mask = (advantage > 0) & (logprob < np.median(logprob))
    [column] = [c for c in waterfall_columns(run) if c.name.startswith("A > 0, unlikely")]
    assert column.name.endswith(f"({mask.sum()})")
    assert column.value == pytest.approx(run.evaluations[0].arrays["per_sequence"][mask].sum())
    rows = present(run.evaluations[0].matrix)[:, mask].sum(1)
    pairs = (rows - rows.sum() / 8).reshape(4, 2).sum(1)
    assert column.stderr == pytest.approx(np.sqrt(4 / 3 * (pairs**2).sum()))
    index = torch.arange(8) // 2
    shares = torch.full((8,), 1 / 8)
    expected = cluster_stderr(torch.from_numpy(rows), torch.tensor(rows.sum()), shares, index)
    assert column.stderr == pytest.approx(expected.item())
    momentum = waterfall_columns(run)[0]
    assert momentum.stderr == pytest.approx(0.1), "the jackknife of Delta H at the smallest eta, over eta"
    assert all(np.isnan(c.stderr) for c in waterfall_columns(training_step(tmp_path))[:-1])


def test_waterfall_of_a_cross_fitted_step_leaves_parts_out(tmp_path: Path) -> None:
    """A group whose rollouts all leave out one part of E has that part neither in its sum nor in its count."""
    rng, n = np.random.default_rng(1), 48
    deviations = rng.standard_normal((5, n))
    run = synthetic_run(tmp_path, matrix=None, deviations=deviations, left_out=np.full(n, 2))
    deviations[2] = 0.0
    advantage = np.array([r["advantage"] for r in run.sequences])
    logprob = np.array([r["mean_logprob"] for r in run.sequences])
    mask = (advantage > 0) & (logprob < np.median(logprob))
    [column] = [c for c in waterfall_columns(run) if c.name.startswith("A > 0, unlikely")]
    sums = deviations[:, mask].sum(1)
    assert column.stderr == pytest.approx(np.sqrt(4 / 3 * (sums**2).sum()))


def test_eta_sweep_draws_the_runs_points_and_tangent(tmp_path: Path) -> None:
    left, right = plot.eta_sweep(synthetic_run(tmp_path)).axes
    x: Any
    y: Any
    bars: Any = right.containers[0]
    lines = [line for line in left.lines if line.get_linestyle() == "-" and np.size(line.get_xdata()) == 200]
    x, y = lines[0].get_data()
    assert y[-1] / x[-1] == pytest.approx(-2.0 * 1e-3), "the tangent, per lr"
    points = bars.lines[0].get_data()
    assert points[1] == pytest.approx([-2.0, -2.0, -2.0])


def test_matrix_is_ordered_and_complete(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    rng = np.random.default_rng(3)
    kinds = rng.permutation(np.repeat([0, 1], 24))
    blocks = rng.standard_normal((8, 2))[:, kinds] + 0.01 * rng.standard_normal((8, 48))
    run = dataclasses.replace(run, evaluations=(dataclasses.replace(run.evaluations[0], matrix=blocks),))
    top, body, *_ = plot.matrix(run).axes
    bars: Any = top.patches
    image = np.asarray(body.images[0].get_array())
    assert np.sort(image.ravel()) == pytest.approx(np.sort(blocks.ravel()))
    assert np.abs(np.diff(image, axis=1)).max(0).tolist().count(pytest.approx(0, abs=0.1)) == 46, (
        "one step between the kinds"
    )
    assert [bar.get_height() for bar in bars] == pytest.approx(image.sum(0))
    low, high = body.images[0].get_clim()
    assert low == -high, "white is 0"


def test_tokens_have_the_colour_of_their_influence(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    values = run.evaluations[0].arrays["per_token"][5, PROMPT:]
    figure = plot.tokens(run, 5)
    boxes = figure.axes[0].patches
    assert len(boxes) == 6
    scale = np.abs(values).max()
    for box, value in zip(boxes, values, strict=True):
        assert box.get_facecolor()[:3] == pytest.approx(DIVERGING((value / scale + 1) / 2)[:3], abs=0.02)
    assert any("nats per unit lr" in text for text in texts(figure))
    masked = [dataclasses.replace(r, completion_mask=(True, False) * 3) for r in run.update_rollouts]
    assert len(plot.tokens(dataclasses.replace(run, update_rollouts=masked), 5).axes[0].patches) == 3


def test_tokens_draw_hostile_text_literally(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    words = ["$\\frac{$", "\x1b[31m", "漢", "\u202e", "a\n", "<script>&"]
    run.sequences[5].update(tokens=words, prompt="$\\bad{ 漢", id="$x$", prompt_id="$\\z{")
    figure = plot.tokens(run, 5)
    path = save(figure, tmp_path / "tokens.svg")
    drawn = texts(figure)
    assert {"$\\frac{$", "\\x1b[31m", "\\u6f22", "\\u202e", "a\\n", "<script>&"} <= set(drawn)
    ElementTree.parse(path)
    lines = [text.get_position()[1] for text in figure.axes[0].texts]
    assert lines[:5] == [0.5] * 5
    assert lines[5] == 1.5, "a newline ends a line"
    run.evaluations[0].arrays["per_sequence"][4:8] = 50.0
    save(plot.waterfall(run, by="prompt"), tmp_path / "waterfall.png")
    assert drawable("漢a\x00") == "\\u6f22a\\x00"


@pytest.mark.slow
def test_figures_of_a_training_step_name_what_is_missing(tmp_path: Path) -> None:
    run = training_step(tmp_path)
    for name in set(FIGURES) - {"matrix"}:
        texts(getattr(plot, name)(run))
    with pytest.raises(ValueError, match="the run has no matrix M"):
        plot.matrix(run)
    evaluation = dataclasses.replace(run.evaluations[0], arrays={**run.evaluations[0].arrays, "eta": np.array([])})
    with pytest.raises(ValueError, match="the run has no finite step"):
        plot.eta_sweep(dataclasses.replace(run, evaluations=(evaluation,)))
    drawn = texts(plot.correlates(run))
    assert any("gradient norm was not" in text.replace("\n", " ") for text in drawn)
    names = {path.stem for path in plot.save_figures(run, tmp_path / "figures")}
    assert "waterfall" in names
    assert "matrix" not in names


@pytest.mark.slow
def test_save_figures_is_reproducible_under_any_user_style(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    first = plot.save_figures(run, tmp_path / "one")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": None}):
        second = plot.save_figures(run, tmp_path / "two")
        assert matplotlib.rcParams["font.size"] == 20
    assert [path.name for path in first] == [path.name for path in second]
    assert len(first) == 20
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
        assert one.suffix == ".png" or b"<dc:date>" not in one.read_bytes()


@pytest.mark.slow
def test_plots_do_not_import_pyplot_and_need_matplotlib() -> None:
    code = "import sys; import fx_influence.lab.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    missing = "import sys; sys.modules['matplotlib'] = None; import fx_influence.lab.plots"
    done = subprocess.run([sys.executable, "-c", missing], capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: figures need matplotlib: pip install 'fx-influence[report]'"
    )
