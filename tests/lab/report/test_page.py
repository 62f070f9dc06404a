"""The page of a run, read as text: what is in it, that no text of a rollout can act, and that the run stays."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.run_files import write_plan
from helpers.tolerances import assert_close_to_rounding

from benchmarks.bench_report import PROMPT, Size, synthetic
from fx_influence.interop.runtime.run_files import RunDirectoryError
from fx_influence.lab.cli import main
from fx_influence.lab.experiment import entropy as run_module
from fx_influence.lab.report import data, figures, report_page, write_report
from fx_influence.lab.report.blobs import array_blob, json_blob, unpack
from fx_influence.lab.results import EntropyInfluenceResults

SIZE = Size(rollouts=40, evaluation=24, tokens=30)
PLAN = {
    "update": {"prompts": "demo/train", "num_prompts": 2, "completions_per_prompt": 4},
    "evaluations": [{"prompts": "demo/eval", "num_prompts": 3, "completions_per_prompt": 2}],
    "directions": ["full"],
    "eta_multiples": [1.0],
    "scaled_eta_multiples": [],
    "auto_scale": None,
    "seed": 1,
}
HOSTILE = '</script><script>alert(1)</script>&"\u202e\x00\ud800'


@pytest.fixture
def results(tmp_path: Path) -> EntropyInfluenceResults:
    return synthetic(SIZE, tmp_path)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures have tests of their own, and take seconds."""
    monkeypatch.setattr("fx_influence.lab.report.page.draw_figures", lambda *_: figures.NO_FIGURES)


def blob(page: str, name: str) -> bytes:
    [text] = re.findall(rf'<script type="text/plain" id="{name}">([^<]*)</script>', page)
    return unpack(text)


def index(page: str) -> dict[str, Any]:
    return json.loads(blob(page, "index"))


def test_the_page_allows_its_own_script_and_style_and_nothing_else(results: EntropyInfluenceResults) -> None:
    page = report_page(results, figures=False)
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.split(" ", 1) for rule in policy.replace("&#39;", "'").split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for name, pattern in (("script-src", r"<script>(.*?)</script>"), ("style-src", r"<style>(.*?)</style>")):
        [source] = re.findall(pattern, page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    assert page.index("Content-Security-Policy") < page.index("<style>") < page.index("<script")
    assert "//" not in re.sub(r"^ *//.*$|<!doctype.*?>", "", re.sub(r"<script type.*?</script>", "", page), flags=re.M)


def test_the_same_run_makes_the_same_bytes_and_its_own_files_stay(
    tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plan = tmp_path / "out", write_plan(tmp_path, PLAN)
    assert main(["run", plan, "--out", str(out)]) == 0
    assert str(out / "report" / "index.html") in capsys.readouterr().out.splitlines()[-1]
    stored = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(["report", str(out)]) == 0
    assert str(out / "report" / "index.html") in capsys.readouterr().out.splitlines()[-1]
    assert main(["run", plan, "--out", str(out)]) == 0
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == stored
    assert [path.name for path in (out / "report").iterdir()] == ["index.html"]


def test_without_jinja2_a_report_fails_and_a_run_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remedy = "the report needs jinja2: pip install 'fx-influence[report]'"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "jinja2" else find(name, *a))
    assert main(["run", write_plan(tmp_path, PLAN), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "rollouts in U" in printed.out
    assert remedy in printed.err.splitlines()[-1]
    assert not (tmp_path / "out" / "report").exists()
    assert main(["report", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines() == [f"fx-influence: {remedy}"]


def test_the_values_of_tokens_and_rollouts_are_those_of_the_run(results: EntropyInfluenceResults) -> None:
    arrays, page = results.evaluations[0].arrays, report_page(results, figures=False)
    found, count = index(page), SIZE.rollouts * SIZE.tokens
    assert found["evaluations"][0]["influence"] == arrays["per_sequence"].tolist()
    assert found["evaluations"][0]["stderr"] == arrays["stderr"].tolist()
    assert found["lr"] == results.summary["lr"]
    numbers = np.frombuffer(blob(page, "tokens-0"), "<u4", count)
    values = np.frombuffer(blob(page, "tokens-0"), "<f4", offset=4 * count).reshape(3, SIZE.rollouts, SIZE.tokens)
    vocabulary = json.loads(blob(page, "vocabulary"))
    assert [vocabulary[k] for k in numbers] == [token for record in results.sequences for token in record["tokens"]]
    for array, name in zip(values, ("logprobs", "entropies", "coefficients"), strict=True):
        np.testing.assert_array_equal(array, results.tokens[name][:, PROMPT:])
    shares = np.frombuffer(blob(page, "influence-0-0"), "<f4").reshape(SIZE.rollouts, SIZE.tokens)
    assert_close_to_rounding(shares, arrays["per_token"][:, PROMPT:], terms=1)


def test_rollouts_are_packed_in_chunks_of_whole_rollouts(
    results: EntropyInfluenceResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "TOKENS_PER_CHUNK", 100)
    page = report_page(results, figures=False)
    assert index(page)["chunks"] == list(range(0, 40, 3))
    sizes = [len(blob(page, f"influence-0-{c}")) // 4 for c in range(14)]
    assert sizes == [90] * 13 + [30]


def test_the_rollouts_of_e_that_each_moves_most_come_in_order(results: EntropyInfluenceResults) -> None:
    [evaluation], moved = results.evaluations, json.loads(blob(report_page(results, figures=False), "moved-0"))
    assert evaluation.matrix is not None
    for i in (0, 17):
        column = np.sort(evaluation.matrix[:, i])[::-1]
        assert moved["values"][i] == [*column[:5], *column[-5:]]
        chosen = [moved["texts"][k]["id"] for k in moved["rows"][i]]
        order = np.argsort(-evaluation.matrix[:, i])
        assert chosen == [evaluation.rollouts[a].id for a in [*order[:5], *order[-5:]]]


def test_a_run_without_matrix_token_values_or_gradient_norms_has_a_page(results: EntropyInfluenceResults) -> None:
    [evaluation] = results.evaluations
    sequences = [{**record, "gradient_norm": None, "stderr": None} for record in results.sequences]
    bare = dataclasses.replace(evaluation, matrix=None, arrays={**evaluation.arrays, "stderr": np.full(40, np.nan)})
    page = report_page(dataclasses.replace(results, tokens={}, sequences=sequences, evaluations=(bare,)), figures=False)
    assert 'id="moved-0"' not in page
    assert index(page)["evaluations"][0]["stderr"] == [None] * 40
    values = np.frombuffer(blob(page, "tokens-0"), "<f4", offset=4 * SIZE.rollouts * SIZE.tokens)
    assert np.isnan(values).all()


def test_tokens_that_do_not_count_have_no_values_and_an_entropy_bonus_has_its_own(
    results: EntropyInfluenceResults,
) -> None:
    mask = (True, False, *[True] * (SIZE.tokens - 2))
    first = dataclasses.replace(results.update_rollouts[0], completion_ids=(0,) * SIZE.tokens, completion_mask=mask)
    tokens = {**results.tokens, "entropy_coefficients": results.tokens["logprobs"] + 1}
    changed = dataclasses.replace(results, update_rollouts=[first, *results.update_rollouts[1:]], tokens=tokens)
    page = report_page(changed, figures=False)
    assert index(page)["values"] == 4
    count = SIZE.rollouts * SIZE.tokens
    values = np.frombuffer(blob(page, "tokens-0"), "<f4", offset=4 * count).reshape(4, count)
    assert np.flatnonzero(np.isnan(values).any(0)).tolist() == [1]
    assert not np.isnan(results.tokens["logprobs"]).any(), "the run's own arrays stay"
    np.testing.assert_array_equal(values[3, 2:5], tokens["entropy_coefficients"][0, PROMPT + 2 : PROMPT + 5])


def test_every_evaluation_has_its_words_and_values(results: EntropyInfluenceResults) -> None:
    [evaluation] = results.evaluations
    other = dataclasses.replace(evaluation, summary={**evaluation.summary, "total": 12345.0, "total_stderr": None})
    page = report_page(dataclasses.replace(results, evaluations=(evaluation, other)), figures=False)
    assert '<select id="evaluation"' in page
    assert len(re.findall(r'<section class="evaluation" data-evaluation="\d"( hidden)?>', page)) == 2
    assert "raises the policy&#39;s entropy by 0.0123 nats per token" in page
    assert blob(page, "influence-1-0") == blob(page, "influence-0-0")


def test_no_text_of_a_rollout_stands_in_the_page_as_it_is(results: EntropyInfluenceResults) -> None:
    texts = dict.fromkeys(("id", "prompt", "completion"), HOSTILE)
    sequences = [{**record, **texts, "tokens": [HOSTILE] * SIZE.tokens} for record in results.sequences]
    [evaluation] = results.evaluations
    rollouts = [dataclasses.replace(r, **texts) for r in evaluation.rollouts]
    changed = dataclasses.replace(
        results, sequences=sequences, evaluations=(dataclasses.replace(evaluation, rollouts=rollouts),)
    )
    page = report_page(changed, figures=False)
    assert page.encode(), "no broken surrogate is left"
    assert "alert(1)" not in page
    assert not any(c in page for c in "\u202e\x00")
    assert index(page)["rollouts"]["completion"] == [HOSTILE] * SIZE.rollouts
    assert json.loads(blob(page, "vocabulary")) == [HOSTILE]


def test_the_name_of_a_run_is_text(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x>\u202e"
    folder.mkdir()
    page = write_report(synthetic(SIZE, folder), figures=False).read_text(encoding="utf-8")
    assert "&lt;img src=x&gt;\\u202e" in page
    assert "<img src=x" not in page


def test_records_that_do_not_fit_are_an_error_of_the_directory(results: EntropyInfluenceResults) -> None:
    longer = [{**results.sequences[0], "tokens": ["x"] * 500}, *results.sequences[1:]]
    with pytest.raises(RunDirectoryError, match="do not fit the columns of per_token"):
        report_page(dataclasses.replace(results, sequences=longer))
    with pytest.raises(RunDirectoryError, match="damaged"):
        report_page(dataclasses.replace(results, sequences=[{"id": "0"}, *results.sequences[1:]]))


def test_a_page_that_cannot_be_written_leaves_nothing_half_done(
    results: EntropyInfluenceResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_report(results, figures=False)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_report(results, figures=False)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]


def test_of_a_figure_in_two_formats_the_drawing_is_taken_unless_it_is_heavy(tmp_path: Path) -> None:
    for name, size in (("waterfall.png", 10), ("waterfall.svg", 20), ("matrix.png", 10), ("matrix.svg", 10**6)):
        (tmp_path / name).write_bytes(b"x" * size)
    paths = [tmp_path / name for name in ("waterfall.png", "waterfall.svg", "matrix.png", "matrix.svg", "notes.txt")]
    first, second = figures.embedded(paths)
    assert first.source == "data:image/svg+xml;base64," + base64.b64encode(b"x" * 20).decode()
    assert second.source.startswith("data:image/png;base64,")
    assert first.title == figures.TITLES["waterfall"]


def test_figures_are_shown_with_their_words_and_kept_as_files(
    results: EntropyInfluenceResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_figures(_: EntropyInfluenceResults, folder: Path) -> list[Path]:
        (folder / "eta_sweep.svg").write_text("<svg/>")
        return [folder / "eta_sweep.svg"]

    monkeypatch.setattr("fx_influence.lab.report.page.draw_figures", figures.draw_figures)
    monkeypatch.setattr("fx_influence.lab.plots.save_figures", save_figures)
    page = write_report(results).read_text(encoding="utf-8")
    assert f'<img src="data:image/svg+xml;base64,PHN2Zy8+" alt="{figures.TITLES["eta_sweep"]}">' in page
    assert (results.path / "report" / "figures" / "eta_sweep.svg").read_text() == "<svg/>"


def test_without_matplotlib_the_page_says_what_is_missing(
    results: EntropyInfluenceResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object) -> None:
        raise ImportError("no matplotlib")

    monkeypatch.setattr("fx_influence.lab.report.page.draw_figures", figures.draw_figures)
    monkeypatch.setattr("fx_influence.lab.plots.save_figures", absent)
    assert "The figures need matplotlib: pip install &#39;fx-influence[report]&#39;" in report_page(results)


def test_nan_is_no_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_blob([float("nan")])
    assert unpack(array_blob(np.arange(3, dtype=">u4"))) == np.arange(3, dtype="<u4").tobytes()


def test_a_step_of_a_training_shows_what_it_logged(results: EntropyInfluenceResults) -> None:
    [evaluation] = results.evaluations
    logged = {"total": -4e-3, "measured": -3.9e-3, "residual": None}
    summary = {**evaluation.summary, "step": 7, "in_this_step": logged, "unattributed": 0.0}
    step = dataclasses.replace(
        results, summary=summary, evaluations=(dataclasses.replace(evaluation, summary=summary),)
    )
    page = report_page(step, figures=False)
    assert "step 7 of a training" in page
    assert "<dt>measured</dt><dd>−0.0039</dd>" in page


def test_the_module_of_the_run_does_not_need_the_report() -> None:
    """``fx.run`` works where jinja2 is not installed."""
    assert not hasattr(run_module, "write_report")
