"""A finished run is printed, analyzed and read back as values; a damaged one is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.present import present
from helpers.run_files import (
    demo_state,
    read_summary,
)

import fx_influence as fx
from fx_influence.core.display import printable
from fx_influence.lab.cli import main
from fx_influence.lab.health import health
from fx_influence.lab.plan import read_plan


@pytest.mark.slow
def test_analyze_leaves_run_files_unchanged(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert main(["analyze", str(copy)]) == 0
    page = capsys.readouterr().out
    assert page.count("Entropy price of reward") == 2
    assert json.loads((copy / "analysis" / "analysis.json").read_text())[1]["settings"]["evaluation"] == 1
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == {
        path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()
    }
    assert main(["analyze", str(tmp_path)]) == 1
    assert "has no plan.yaml" in capsys.readouterr().err


def test_report_prints_totals_checks_and_rollouts(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(finished)]) == 0
    page, s = capsys.readouterr().out, read_summary(finished)
    for figure in (f"{s['momentum']:+.5g}", f"{s['weight_decay']:+.5g}", f"{s['total']:+.5g}"):
        assert figure in page
    assert f"{s['relative_residual']:.1e}" in page
    assert f"{s['finite_steps'][0]['full']:+.4e}" in page
    sequences = [json.loads(line) for line in (finished / "update_sequences.jsonl").read_text().splitlines()]
    strongest = max(sequences, key=lambda r: r["influence"])
    row = next(line for line in page.splitlines() if strongest["id"] in line and strongest["completion"] in line)
    assert f"{strongest['influence']:+.4g} ± {strongest['stderr']:.2g}" in row
    assert f"{strongest['advantage']:+.2f}" in row
    warnings = [f"{f.name}: {f.text}" for f in health(fx.load_run(finished)) if f.level == "attention"]
    assert any("E is too small" in text for text in warnings)
    assert all(text in page for text in warnings)


def test_report_prints_hostile_text_literally(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    records = [json.loads(line) for line in (copy / "update_sequences.jsonl").read_text().splitlines()]
    for record in records:
        record["completion"] = "[bold]x[/bold]\x1b[31m\u202e\ud800"
        record["tokens"] = ["\x1b]0;title\x07"] * len(record["tokens"])
    (copy / "update_sequences.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert main(["report", str(copy)]) == 0
    page = capsys.readouterr().out
    assert "[bold]x[/bold]\\x1b[31m\\u202e\\ud800" in page
    assert not any(c in page for c in ("\x1b]", "\x1b[31m", "\u202e", "\x07"))
    assert printable("plain ü 漢") == "plain ü 漢"


@pytest.mark.slow
def test_command_prints_help_and_rejects_nonsense(finished: Path) -> None:
    command = [sys.executable, "-m", "fx_influence.lab.cli"]
    help_text = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "run" in help_text
    assert "report" in help_text
    wrong = subprocess.run([*command, "report", "/nonexistent"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "has no plan.yaml" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_load_run_returns_stored_values(finished: Path) -> None:
    results = fx.load_run(finished)
    assert results.plan.to_dict() == yaml.safe_load((finished / "plan.yaml").read_text())
    assert [present(e.matrix).shape for e in results.evaluations] == [(16, 20), (9, 20)]
    assert [r["id"] for r in results.sequences] == [r.id for r in results.update_rollouts]
    assert [r["influence"] for r in results.sequences] == results.evaluations[0].arrays["per_sequence"].tolist()
    assert set(results.baseline()) == set(demo_state()[1])
    assert results.summary["evaluations"] == [e.summary for e in results.evaluations]


def test_results_give_tables(finished: Path) -> None:
    results = fx.load_run(finished)
    table = results.table()
    assert table["influence"].tolist() == [r["influence"] for r in results.sequences]
    steps, arrays = results.finite_steps(1), results.evaluations[1].arrays
    assert len(steps) == 4 * 20
    picked = steps[(steps["eta"] == arrays["eta"][1]) & (steps["id"] == results.sequences[3]["id"])]
    assert picked["grad"].tolist() == [arrays["grad"][1, 3]]
    assert picked["grad_stderr"].tolist() == [arrays["grad_stderr"][1, 3]]
    assert picked["baseline_plus_grad"].tolist() == [arrays["baseline_plus_grad"][1, 3] - arrays["baseline"][1]]
    assert picked["first_order"].tolist() == [arrays["eta"][1] * arrays["per_sequence"][3]]


def test_table_names_remedy_without_pandas(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="a table needs pandas: pip install pandas"):
        fx.load_run(finished).table()


def test_run_returns_results_of_its_plan(finished: Path) -> None:
    plan = read_plan(finished / "plan.yaml", fx.lab.EntropyInfluencePlan)
    results = fx.lab.run(plan, finished)
    assert isinstance(results, fx.lab.EntropyInfluenceResults)
    assert results.plan == plan
    with pytest.raises(dataclasses.FrozenInstanceError):
        results.plan = plan  # type: ignore[misc]


@pytest.mark.parametrize("name", ["eval_00.npz", "eval_01_delta_matrix.npy", "summary.json", "update_rollouts.jsonl"])
def test_report_rejects_truncated_or_missing_file(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    assert main(["report", str(copy)]) == 1
    assert "is damaged" in capsys.readouterr().err
    (copy / name).unlink()
    assert main(["report", str(copy)]) == 1
    assert re.search(rf"is damaged|has no {re.escape(name)}", capsys.readouterr().err)


def as_version_0_1(directory: Path) -> None:
    """Give the fields of a run directory the names that version 0.1 stored."""
    plan = yaml.safe_load((directory / "plan.yaml").read_text())
    plan["gain"] = {"frozen": "share", "jacobian": "marginal"}[plan.pop("preconditioner")]
    (directory / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    for name in ("summary.json", "eval_00.json"):
        figures = json.loads((directory / name).read_text())
        figures["step"] = 5
        figures["in_this_step"] = {"total": -2e-3, "realised": -2.1e-3, "realised_stderr": 1e-4}
        (directory / name).write_text(json.dumps(figures))
    files = sorted(
        path for path in directory.iterdir() if path.is_file() and path.name not in ("SHA256SUMS", "summary.json")
    )
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (directory / "SHA256SUMS").write_text(sums)


def test_load_run_reads_directory_of_version_0_1(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    as_version_0_1(copy)
    results = fx.load_run(copy)
    assert results.plan == fx.load_run(finished).plan
    for figures in (results.summary, results.evaluations[0].summary):
        assert figures["in_this_step"] == {"total": -2e-3, "measured": -2.1e-3, "measured_stderr": 1e-4}
    assert main(["report", str(copy)]) == 0
    before = capsys.readouterr()
    assert "realised" not in before.out
    # The same command finds its own finished run there, under the old plan's names.
    assert main(["run", str(finished / "plan.yaml"), "--out", str(copy)]) == 0


def test_run_reads_plan_of_version_0_1_with_a_note(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    as_version_0_1(copy)
    shutil.copy(copy / "plan.yaml", tmp_path / "old.yaml")
    assert main(["run", str(tmp_path / "old.yaml"), "--out", str(copy)]) == 0
    assert "gain: share is called preconditioner: frozen now; it is read as that" in capsys.readouterr().err
