"""``report/index.html`` of a run: one file that opens from disk and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from fx_influence.interop.runtime.run_files import raise_if_damaged
from fx_influence.lab.report.data import explorer_blobs
from fx_influence.lab.report.figures import NO_FIGURES, draw_figures
from fx_influence.lab.report.sections import facts, section, title
from fx_influence.lab.results import EntropyInfluenceResults

HERE = Path(__file__).parent
FOLDER, PAGE = "report", "index.html"
SCRIPTS = ("format.js", "data.js", "table.js", "tokens.js", "detail.js", "explorer.js")
"""In the order in which they stand in the page, inside one function."""
MARKS = {"good": "✓ fine", "attention": "! attention", "unknown": "– not known"}


def write_report(results: EntropyInfluenceResults, figures: bool = True) -> Path:
    """Write the page of a run into ``report/`` of its directory and return its path; the run's own files stay.

    ``figures``: with the figures of the first E, drawn into ``report/figures`` and kept there as files. They take most
    of the time.

    Raises ``ImportError`` naming the remedy where jinja2 is missing, ``RunDirectoryError`` where the run's records do
    not fit its arrays, and ``OSError`` where the page cannot be written.

    Example, after ``make demo``: ``write_report(load_run("runs/demo"))``.
    """
    _jinja2()
    folder = results.path / FOLDER
    folder.mkdir(exist_ok=True)
    path, temporary = folder / PAGE, folder / f".{PAGE}.{os.getpid()}.tmp"
    try:
        temporary.write_text(report_page(results, figures), encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def report_page(results: EntropyInfluenceResults, figures: bool = True) -> str:
    """The page as text. The same run makes the same text. Arguments and errors are those of ``write_report``."""
    jinja2 = _jinja2()
    with raise_if_damaged(results.path):
        blobs = explorer_blobs(results)
        sections = [section(results, i) for i in range(len(results.evaluations))]
    style, script = (HERE / "explorer.css").read_text(encoding="utf-8"), _script()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((HERE / "template.html.j2").read_text(encoding="utf-8"))
    markup = importlib.import_module("markupsafe").Markup
    page: str = template.render(
        policy=_policy(style, script),
        style=markup(style),
        script=markup(script),
        title=title(results),
        facts=facts(results),
        sections=sections,
        marks=MARKS,
        figures=draw_figures(results, results.path / FOLDER / "figures") if figures else NO_FIGURES,
        blobs=blobs,
    )
    return page


def _script() -> str:
    """The sources inside one function, so that nothing of them is global."""
    sources = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{sources}}})();\n'


def _policy(style: str, script: str) -> str:
    """Only this style and this script count, nothing is fetched, and no text can become markup."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
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


def _jinja2() -> Any:
    if importlib.util.find_spec("jinja2") is None:
        raise ImportError("the report needs jinja2: pip install 'fx-influence[report]'")
    return importlib.import_module("jinja2")
