"""A bundle as files: what is in it and what is not, and which folders it replaces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.made_trainings import write_made_ledger

from fx_influence.interop.ledger.file import LEDGER
from fx_influence.interop.runtime.run_files import RunDirectoryError
from fx_influence.lab.cli import main
from fx_influence.lab.report import bundle, figures, write_bundle


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fx_influence.lab.report.figures.draw_training_figures", lambda *_: figures.NO_FIGURES)


@pytest.fixture
def training(tmp_path: Path) -> Path:
    write_made_ledger(tmp_path / "steps", 3)
    (tmp_path / "steps" / "secret.pt").write_bytes(b"weights")
    return tmp_path / "steps"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_bundle_has_pages_and_the_ledger_alone(training: Path, tmp_path: Path) -> None:
    before = files(training)
    index = write_bundle(training, tmp_path / "public")
    assert index == tmp_path / "public" / "index.html"
    assert files(tmp_path / "public") == {"index.html", bundle.MARKER, LEDGER, "report/index.html"}
    assert (tmp_path / "public" / LEDGER).read_bytes() == (training / LEDGER).read_bytes()
    assert files(training) == before, "the directory is only read"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["public", "steps"], "nothing temporary is left"


def test_bundle_replaces_a_bundle_and_nothing_else(
    training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "public"
    write_bundle(training, out)
    (out / "old.html").write_text("old")
    assert main(["bundle", str(training), str(out)]) == 0
    assert "old.html" not in files(out)
    (out / bundle.MARKER).unlink()
    capsys.readouterr()
    assert main(["bundle", str(training), str(out)]) == 1
    assert "holds something else than a bundle; expected a bundle, or nothing. Choose another OUT" in (
        capsys.readouterr().err
    )
    assert "index.html" in files(out)


def test_bundle_names_a_directory_without_runs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunDirectoryError, match=r"holds no run; expected ledger\.jsonl"):
        write_bundle(tmp_path / "empty", tmp_path / "public")
    assert not (tmp_path / "public").exists()


def test_bundle_is_not_written_into_what_it_bundles(training: Path) -> None:
    with pytest.raises(RunDirectoryError, match="is in the directory that is bundled"):
        write_bundle(training, training / "public")


def test_bundle_lists_runs_side_by_side(training: Path, tmp_path: Path) -> None:
    write_made_ledger(tmp_path / "both" / "a b", 2)
    write_made_ledger(tmp_path / "both" / "b", 2)
    (tmp_path / "both" / "checkpoint-1").mkdir()
    write_bundle(tmp_path / "both", tmp_path / "public")
    pages = json.loads((tmp_path / "public" / bundle.MARKER).read_text())["pages"]
    assert pages == ["a%20b/report/index.html", "b/report/index.html"]
    text = (tmp_path / "public" / "index.html").read_text(encoding="utf-8")
    assert all(f'<a href="{page}">' in text for page in pages)
