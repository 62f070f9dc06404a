"""``report/index.html`` of a run: one file that opens from disk and makes no network request."""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fx_influence.interop.runtime.run_files import raise_if_damaged
from fx_influence.lab.report.data import explorer_blobs
from fx_influence.lab.report.figures import NO_FIGURES, draw_figures
from fx_influence.lab.report.sections import facts, section, title
from fx_influence.lab.results import EntropyInfluenceResults

SOURCES = Path(__file__).parent
FOLDER, PAGE = "report", "index.html"
SCRIPTS = ("format.js", "data.js", "table.js", "tokens.js", "detail.js", "strongest.js", "address.js", "explorer.js")
"""Sources in their order in the page, inside one function."""
MARKS = {"good": "✓ passed", "attention": "! attention", "unknown": "– unknown"}


def write_report(results: EntropyInfluenceResults, figures: bool = True) -> Path:
    """Write the page of a run into ``report/`` of its directory and return its path; the run's files are not changed.

    Args:
        results: a finished run.
        figures: whether to draw the figures of the first E, which are also written to ``report/figures``. They take
            most of the time.

    Raises:
        ImportError: if jinja2 is missing; the message names the remedy.
        RunDirectoryError: if the run's records do not fit its arrays.
        OSError: if the page cannot be written.

    Example, after ``make demo``: ``write_report(load_run("runs/demo"))``.
    """
    return write_page(results.path, lambda: report_page(results, figures))


def write_page(directory: Path, make: Callable[[], str]) -> Path:
    """Write a page into ``report/`` of a directory, complete or not at all, and return its path.

    Raises:
        ImportError: if jinja2 is missing; the message names the remedy.
        OSError: if the page cannot be written.
    """
    require_jinja2()
    folder = directory / FOLDER
    folder.mkdir(exist_ok=True)
    path, temporary = folder / PAGE, folder / f".{PAGE}.{os.getpid()}.tmp"
    try:
        temporary.write_text(make(), encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def report_page(results: EntropyInfluenceResults, figures: bool = True, folder: Path | None = None) -> str:
    """Return the page as text, the same for the same run. Errors are those of ``write_report``.

    Args:
        results: a finished run.
        figures: whether to draw the figures of the first E.
        folder: directory of the figures' files; None takes ``report/figures`` of the run.
    """
    with raise_if_damaged(results.path):
        blobs = explorer_blobs(results)
        sections = [section(results, i) for i in range(len(results.evaluations))]
    style, script = (SOURCES / "explorer.css").read_text(encoding="utf-8"), _script()
    return render(
        "template.html.j2",
        style,
        script,
        title=title(results),
        facts=facts(results),
        sections=sections,
        marks=MARKS,
        figures=draw_figures(results, folder or results.path / FOLDER / "figures") if figures else NO_FIGURES,
        blobs=blobs,
    )


def render(template: str, style: str, script: str | None, **values: Any) -> str:
    """Return a page from one of this folder's templates; every value in it is escaped.

    Args:
        template: name of the file.
        style: style sheet of the page.
        script: script of the page, None where it has none.
        **values: what the template shows.
    """
    jinja2 = require_jinja2()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, loader=jinja2.FileSystemLoader(SOURCES)
    )
    markup = importlib.import_module("markupsafe").Markup
    page: str = environment.get_template(template).render(
        policy=_policy(style, script), style=markup(style), script=markup(script or ""), **values
    )
    return page


def _script() -> str:
    """Return the scripts inside one function, so that none of their names is global."""
    sources = "\n".join((SOURCES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{sources}}})();\n'


def _policy(style: str, script: str | None) -> str:
    """Return a content security policy: only this style and script run, no request is made, no text becomes markup."""
    return "; ".join(
        (
            "default-src 'none'",
            "script-src 'none'" if script is None else f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hash(source: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode('utf-8')).digest()).decode('ascii')}"


def require_jinja2() -> Any:
    """Return jinja2. Raises ``ImportError``, naming the remedy, where it is missing."""
    if importlib.util.find_spec("jinja2") is None:
        raise ImportError("the report needs jinja2: pip install 'fx-influence[report]'")
    return importlib.import_module("jinja2")
