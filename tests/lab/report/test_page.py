"""The page of a run, read as text: its contents, that texts never become markup, that the run is unchanged."""

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

from benchmarks.costs.bench_report import PROMPT, Size, synthetic
from fx_influence.interop.runtime.run_files import RunDirectoryError
from fx_influence.lab.cli import main
from fx_influence.lab.experiment import entropy as run_module
from fx_influence.lab.report import figures, report_page, write_report
from fx_influence.lab.report.blobs import array_blob, json_blob, unpack
from fx_influence.lab.report.data import explorer_blobs
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
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Omit the figures, which have their own tests and take seconds."""
    monkeypatch.setattr("fx_influence.lab.report.page.draw_figures", lambda *_: figures.NO_FIGURES)


def blob(page: str, name: str) -> bytes:
    [text] = re.findall(rf'<script type="text/plain" id="{name}">([^<]*)</script>', page)
    return unpack(text)


def index(page: str) -> dict[str, Any]:
    return json.loads(blob(page, "index"))


def test_page_policy_allows_only_its_script_and_style(results: EntropyInfluenceResults) -> None:
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


@pytest.mark.slow
def test_report_is_reproducible_and_keeps_the_runs_files(
    tmp_path: Path, without_figures: None, capsys: pytest.CaptureFixture[str]
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


@pytest.mark.slow
def test_report_fails_but_run_succeeds_without_jinja2(
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


def test_page_data_match_the_run(results: EntropyInfluenceResults) -> None:
    arrays, page = results.evaluations[0].arrays, report_page(results, figures=False)
    data, count = index(page), SIZE.rollouts * SIZE.tokens
    assert data["evaluations"][0]["influence"] == arrays["per_sequence"].tolist()
    assert data["evaluations"][0]["stderr"] == arrays["stderr"].tolist()
    assert data["lr"] == results.summary["lr"]
    numbers = np.frombuffer(blob(page, "tokens-0"), "<u4", count)
    values = np.frombuffer(blob(page, "tokens-0"), "<f4", offset=4 * count).reshape(3, SIZE.rollouts, SIZE.tokens)
    vocabulary = json.loads(blob(page, "vocabulary"))
    assert [vocabulary[k] for k in numbers] == [token for record in results.sequences for token in record["tokens"]]
    for array, name in zip(values, ("logprobs", "entropies", "coefficients"), strict=True):
        np.testing.assert_array_equal(array, results.tokens[name][:, PROMPT:])
    shares = np.frombuffer(blob(page, "influence-0-0"), "<f4").reshape(SIZE.rollouts, SIZE.tokens)
    assert_close_to_rounding(shares, arrays["per_token"][:, PROMPT:], terms=1)


def test_explorer_blobs_do_not_split_rollouts(results: EntropyInfluenceResults) -> None:
    blobs = explorer_blobs(results, tokens_per_chunk=100)
    assert json.loads(unpack(blobs["index"]))["chunks"] == list(range(0, 40, 3))
    lengths = [len(unpack(blobs[f"influence-0-{c}"])) // 4 for c in range(14)]
    assert lengths == [90] * 13 + [30]


def test_page_lists_most_affected_rollouts_in_order(results: EntropyInfluenceResults) -> None:
    [evaluation], affected = results.evaluations, json.loads(blob(report_page(results, figures=False), "affected-0"))
    assert evaluation.matrix is not None
    for i in (0, 17):
        column = np.sort(evaluation.matrix[:, i])[::-1]
        assert affected["values"][i] == [*column[:5], *column[-5:]]
        listed = [affected["texts"][k]["id"] for k in affected["rows"][i]]
        order = np.argsort(-evaluation.matrix[:, i])
        assert listed == [evaluation.rollouts[a].id for a in [*order[:5], *order[-5:]]]


def test_page_omits_values_that_were_not_stored(results: EntropyInfluenceResults) -> None:
    [evaluation] = results.evaluations
    sequences = [{**record, "gradient_norm": None, "stderr": None} for record in results.sequences]
    bare = dataclasses.replace(evaluation, matrix=None, arrays={**evaluation.arrays, "stderr": np.full(40, np.nan)})
    page = report_page(dataclasses.replace(results, tokens={}, sequences=sequences, evaluations=(bare,)), figures=False)
    assert 'id="affected-0"' not in page
    assert index(page)["evaluations"][0]["stderr"] == [None] * 40
    values = np.frombuffer(blob(page, "tokens-0"), "<f4", offset=4 * SIZE.rollouts * SIZE.tokens)
    assert np.isnan(values).all()


def test_page_values_of_masked_tokens_and_entropy_bonus(
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
    assert not np.isnan(results.tokens["logprobs"]).any(), "the run's arrays are not changed"
    np.testing.assert_array_equal(values[3, 2:5], tokens["entropy_coefficients"][0, PROMPT + 2 : PROMPT + 5])


def test_page_has_a_section_for_each_evaluation(results: EntropyInfluenceResults) -> None:
    [evaluation] = results.evaluations
    other = dataclasses.replace(evaluation, summary={**evaluation.summary, "total": 12345.0, "total_stderr": None})
    page = report_page(dataclasses.replace(results, evaluations=(evaluation, other)), figures=False)
    assert '<select id="evaluation"' in page
    assert len(re.findall(r'<section class="evaluation" data-evaluation="\d"( hidden)?>', page)) == 2
    assert "raises the policy&#39;s entropy by 0.0123 nats per token" in page
    assert blob(page, "influence-1-0") == blob(page, "influence-0-0")


def test_page_contains_no_raw_text_of_a_rollout(results: EntropyInfluenceResults) -> None:
    texts: dict[str, Any] = dict.fromkeys(("id", "prompt", "completion", "source"), HOSTILE)
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
    for name in ("completion", "source"):
        assert index(page)["rollouts"][name] == [HOSTILE] * SIZE.rollouts
    assert json.loads(blob(page, "vocabulary")) == [HOSTILE]


def test_page_escapes_the_name_of_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x>\u202e"
    folder.mkdir()
    page = write_report(synthetic(SIZE, folder), figures=False).read_text(encoding="utf-8")
    assert "&lt;img src=x&gt;\\u202e" in page
    assert "<img src=x" not in page


def test_page_rejects_records_that_do_not_fit(results: EntropyInfluenceResults) -> None:
    longer = [{**results.sequences[0], "tokens": ["x"] * 500}, *results.sequences[1:]]
    with pytest.raises(RunDirectoryError, match="do not fit the columns of per_token"):
        report_page(dataclasses.replace(results, sequences=longer))
    with pytest.raises(RunDirectoryError, match="damaged"):
        report_page(dataclasses.replace(results, sequences=[{"id": "0"}, *results.sequences[1:]]))


def test_write_report_keeps_the_old_page_when_it_fails(
    results: EntropyInfluenceResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_report(results, figures=False)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_report(results, figures=False)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]


def test_embedded_prefers_svg_unless_large(tmp_path: Path) -> None:
    for name, size in (("waterfall.png", 10), ("waterfall.svg", 20), ("matrix.png", 10), ("matrix.svg", 10**6)):
        (tmp_path / name).write_bytes(b"x" * size)
    paths = [tmp_path / name for name in ("waterfall.png", "waterfall.svg", "matrix.png", "matrix.svg", "notes.txt")]
    first, second = figures.embedded(paths)
    assert first.source == "data:image/svg+xml;base64," + base64.b64encode(b"x" * 20).decode()
    assert second.source.startswith("data:image/png;base64,")
    assert first.title == figures.TITLES["waterfall"]


def test_page_embeds_figures_and_keeps_their_files(
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


def test_page_names_the_remedy_without_matplotlib(
    results: EntropyInfluenceResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object) -> None:
        raise ImportError("no matplotlib")

    monkeypatch.setattr("fx_influence.lab.report.page.draw_figures", figures.draw_figures)
    monkeypatch.setattr("fx_influence.lab.plots.save_figures", absent)
    assert "The figures need matplotlib: pip install &#39;fx-influence[report]&#39;" in report_page(results)


def test_json_blob_rejects_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_blob([float("nan")])
    assert unpack(array_blob(np.arange(3, dtype=">u4"))) == np.arange(3, dtype="<u4").tobytes()


def test_page_of_a_training_step_lists_logged_metrics(results: EntropyInfluenceResults) -> None:
    [evaluation] = results.evaluations
    logged = {"total": -4e-3, "measured": -3.9e-3, "residual": None}
    summary = {**evaluation.summary, "step": 7, "in_this_step": logged, "unattributed": 0.0}
    step = dataclasses.replace(
        results, summary=summary, evaluations=(dataclasses.replace(evaluation, summary=summary),)
    )
    page = report_page(step, figures=False)
    assert "step 7 of a training run" in page
    assert "<dt>measured</dt><dd>−0.0039</dd>" in page


def test_run_does_not_import_the_report() -> None:
    """``fx.lab.run`` works where jinja2 is not installed."""
    assert not hasattr(run_module, "write_report")
