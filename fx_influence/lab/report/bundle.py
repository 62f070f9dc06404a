"""Bundle the pages of training runs and runs into a static folder that any web server or Hub space shows."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from fx_influence.core.display import printable
from fx_influence.interop.ledger.file import LEDGER
from fx_influence.interop.runtime.run_files import SEQUENCES, SUMMARY, RunDirectoryError
from fx_influence.lab.console.headline import headline
from fx_influence.lab.report.page import FOLDER, PAGE, SOURCES, render, report_page
from fx_influence.lab.report.training_page import steps_with_page, strongest_steps, training_page
from fx_influence.lab.report.training_tables import step_directory, step_page
from fx_influence.lab.results import load_run
from fx_influence.lab.training.load import Training, load_training
from fx_influence.lab.training.sentences import training_sentences

MARKER = "bundle.json"
"""File that lists a bundle's pages, by which a folder is known to be one."""


class Entry(NamedTuple):
    """A run in a bundle: its name, kind, first sentence, and the path of its page from the folder."""

    name: str
    kind: str
    sentence: str
    page: str


def write_bundle(directory: Path, out: Path) -> Path:
    """Write the pages of a run, of a training run, or of all in a directory into a static folder; return its index.

    A training run is its page, its ledger, and the pages of the steps that hold its strongest rollouts or have a page
    already. All pages are made anew from the data; links between them are relative. Nothing else of the directory is
    copied: no weights, optimizer states or plans.

    Args:
        directory: of a run, of a training run's measured steps, or with such directories in it.
        out: the folder, which is made; one that an earlier bundle is in is replaced.

    Raises:
        RunDirectoryError: if the directory holds no run, and if ``out`` holds anything but a bundle.
        ImportError: if jinja2 is missing; the message names the remedy.
        OSError: if the folder cannot be written.

    Example, after ``make demo``: ``write_bundle(Path("runs/demo"), Path("public"))``.
    """
    _check_out(directory, out)
    runs = _runs_in(directory)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        made = Path(folder) / "bundle"
        made.mkdir()
        single = runs == [directory]
        entries = [_write_run(run, made if single else made / run.name, "" if single else run.name) for run in runs]
        title = printable(directory.resolve().name)
        (made / PAGE).write_text(_index(title, entries), encoding="utf-8", newline="\n")
        (made / MARKER).write_text(json.dumps({"pages": [entry.page for entry in entries]}), encoding="utf-8")
        made.chmod(0o755)
        if out.exists():
            os.replace(out, Path(folder) / "replaced")
        os.replace(made, out)
    return out / PAGE


def _check_out(directory: Path, out: Path) -> None:
    if out.resolve() == directory.resolve() or directory.resolve() in out.resolve().parents:
        raise RunDirectoryError(
            f"{str(out)!r} is in the directory that is bundled; expected one beside it. Choose another OUT"
        )
    if out.exists() and not (out.is_dir() and ((out / MARKER).is_file() or not any(out.iterdir()))):
        raise RunDirectoryError(
            f"{str(out)!r} holds something else than a bundle; expected a bundle, or nothing. Choose another OUT"
        )


def _runs_in(directory: Path) -> list[Path]:
    if _is_run(directory):
        return [directory]
    runs = sorted(path for path in directory.iterdir() if path.is_dir() and _is_run(path))
    if not runs:
        raise RunDirectoryError(
            f"{str(directory)!r} holds no run; expected {LEDGER}, or {SUMMARY} and {SEQUENCES}, in it or in one "
            "of its directories. Name the directory of a run, or of a training run's measured steps"
        )
    return runs


def _is_run(path: Path) -> bool:
    return (path / LEDGER).is_file() or ((path / SUMMARY).is_file() and (path / SEQUENCES).is_file())


def _write_run(directory: Path, folder: Path, name: str) -> Entry:
    """Write the pages of one run or training run into a folder, and return its entry of the index."""
    link = f"{quote(os.fsencode(name), safe='')}/{FOLDER}/{PAGE}" if name else f"{FOLDER}/{PAGE}"
    shown = printable(directory.resolve().name)
    with tempfile.TemporaryDirectory() as figures:
        if (directory / LEDGER).is_file():
            training = load_training(directory)
            _write_training(training, folder, Path(figures))
            return Entry(shown, "training run", printable(training_sentences(training)[0]), link)
        results = load_run(directory)
        _write(folder / FOLDER / PAGE, report_page(results, folder=Path(figures)))
        return Entry(shown, "run", headline(results).sentence, link)


def _write_training(training: Training, folder: Path, figures: Path) -> None:
    pages = {step for step in _steps(training) if (training.path / step_directory(step)).is_dir()}
    for step in sorted(pages):
        results = load_run(training.path / step_directory(step))
        _write(folder / step_page(step), report_page(results, figures=False))
    _write(folder / FOLDER / PAGE, training_page(training, pages=pages, folder=figures))
    shutil.copyfile(training.path / LEDGER, folder / LEDGER)


def _steps(training: Training) -> Set[int]:
    return strongest_steps(training) | steps_with_page(training)


def _write(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", newline="\n")


def _index(title: str, entries: list[Entry]) -> str:
    style = (SOURCES / "explorer.css").read_text(encoding="utf-8")
    return render("bundle.html.j2", style, None, title=title, entries=entries)
