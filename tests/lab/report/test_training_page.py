"""The page of a training run, read as text: values, links, hostile texts, the command that writes it."""

from __future__ import annotations

import html
import importlib
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.made_trainings import made_entry, write_made_ledger

import fx_influence as fx
from fx_influence.interop.ledger.file import append_entry
from fx_influence.lab.cli import main
from fx_influence.lab.console.numbers import Scale
from fx_influence.lab.report import training_page, write_training_report
from fx_influence.lab.report.training_tables import MAX_KINDS, MAX_PROMPTS, MAX_ROLLOUTS
from fx_influence.lab.training.account import account, label_sums, strongest_labels
from fx_influence.lab.training.prompts import returning_prompts
from fx_influence.lab.training.sentences import training_sentences

# The package has a function of the module's name.
training_page_module = importlib.import_module("fx_influence.lab.report.training_page")
HOSTILE = (
    "</bdi><script>window.ran = 1; alert(1)</script>",
    "<img src=x onerror='window.ran = 1'>",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt;",
    "abc\u202egnp\x00\x1b[31m\ud800",
)


class Cells(HTMLParser):
    """The texts of a page's cells, row by row, and the names of all elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.elements: set[str] = set()
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "a":
            self.links.append(str(dict(attrs)["href"]))

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


@pytest.fixture
def training(tmp_path: Path) -> fx.lab.Training:
    write_made_ledger(tmp_path, 9, every=10)
    return fx.load_training(tmp_path)


def number(text: str) -> float:
    return float(re.sub("[+± ]", "", text.replace("−", "-")))


def test_page_shows_the_sentences_and_the_account(training: fx.lab.Training) -> None:
    page = training_page(training, figures=False)
    for sentence in training_sentences(training):
        assert sentence in html.unescape(page)
    summed = account(training)
    # The first of a name: the table of lifetime effects has these labels again.
    rows = {row[0]: row for row in reversed(Cells(page).rows) if len(row) > 1}
    terms = [*summed.terms, summed.predicted, summed.measured, summed.unexplained]
    scale = Scale.of(max(abs(term.value) for term in terms))
    for term in terms:
        assert rows[term.name][1] == scale.text(term.value)
        assert (rows[term.name][2] == "") == np.isnan(term.stderr)
    for label in [*strongest_labels(training)[:MAX_KINDS], *label_sums(training, "source")]:
        name = label.term.name if label.kind in ("region", "source", "third") else f"{label.kind}: {label.term.name}"
        assert abs(number(rows[name][1]) * 10.0**scale.power - label.term.value) < 1e-6


def test_page_has_every_measured_step(training: fx.lab.Training) -> None:
    rows = [row for row in Cells(training_page(training, figures=False)).rows if len(row) > 10]
    assert [row[0] for row in rows[1:]] == [str(step) for step in training.steps["step"]]
    column = rows[0].index("measured")
    shown = [number(row[column]) for row in rows[1:]]
    assert shown == [float(f"{x:.3g}") for x in training.steps["measured"]]


def test_rollouts_link_to_pages_that_exist(training: fx.lab.Training) -> None:
    step = max(training.strongest, key=lambda r: abs(r["influence"]))["step"]
    assert Cells(training_page(training, figures=False)).links == []
    page = training.path / f"step_{step:06d}" / "report" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("page")
    links = Cells(training_page(training, figures=False)).links
    chosen = sorted(training.strongest, key=lambda r: -abs(r["influence"]))[:MAX_ROLLOUTS]
    ids = [r["id"] for r in chosen if r["step"] == step]
    assert links == [f"../step_{step:06d}/report/index.html#rollout={name.replace('/', '%2F')}" for name in ids]
    assert (training.path / "report" / links[0].partition("#")[0]).resolve() == page.resolve()


def test_report_writes_pages_of_the_strongest_steps(training: fx.lab.Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step has its page from before, one has its files, the files of the others were deleted."""
    first, second, *_ = sorted(training_page_module.strongest_steps(training))
    old = training.path / f"step_{first:06d}" / "report" / "index.html"
    old.parent.mkdir(parents=True)
    old.write_text("page")
    (training.path / f"step_{second:06d}").mkdir()
    written: list[tuple[Path, bool]] = []
    monkeypatch.setattr(training_page_module, "load_run", lambda path: path)
    monkeypatch.setattr(training_page_module, "write_report", lambda path, figures: written.append((path, figures)))
    write_training_report(training, figures=False)
    assert written == [(training.path / f"step_{second:06d}", False)]
    assert old.read_text() == "page"


def test_returning_prompts_are_on_the_page(training: fx.lab.Training) -> None:
    series = returning_prompts(training)
    head, *shown = [row for row in Cells(training_page(training, figures=False)).rows if len(row) == 6]
    unit = {"nats": 1.0, "10⁻³ nats": 1e-3, "10⁻⁶ nats": 1e-6}[head[2]]
    assert len(shown) == min(len(series), MAX_PROMPTS)
    for row, x in zip(shown, series, strict=False):
        assert row[1] == str(len(x.steps))
        assert unit * number(row[2]) == pytest.approx(x.term.value, abs=1e-4 * abs(series[0].term.value))
        assert unit * number(row[3]) == pytest.approx(x.term.stderr, abs=1e-4 * abs(series[0].term.value))


def test_hostile_texts_are_literal(tmp_path: Path) -> None:
    entry = made_entry(1, np.random.default_rng(0), 0.8, HOSTILE)
    entry["sums"]["source"] = [[text, -1e-3, 1e-5, 4, 0.25] for text in HOSTILE]
    entry["sums"][HOSTILE[0]] = [[HOSTILE[1], -1e-2, 1e-5, 4, 0.25], ["rest", 1e-5, 1e-6, 4, 0.75]]
    append_entry(tmp_path, {**entry, "preconditioner": HOSTILE[0], "normalize": HOSTILE[1]})
    page = training_page(fx.load_training(tmp_path), figures=False)
    assert not {"script", "img"} & Cells(page).elements
    assert not re.search("[\x00\x1b\u202e\ud800]", page)
    assert "script-src 'none'" in html.unescape(page)


def test_same_ledger_makes_the_same_page(training: fx.lab.Training) -> None:
    assert training_page(training, figures=False) == training_page(training, figures=False)


@pytest.mark.slow
def test_report_writes_the_page_of_a_training_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_made_ledger(tmp_path, 4)
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "The account" in out
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/') == 2 + 4 + 1
    assert "Influence by region, summed up" in page
