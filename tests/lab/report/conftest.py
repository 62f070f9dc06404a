"""Fixtures of the pages in a browser: Chromium, a finished run, and pages that fail a test if they complain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.run_files import write_plan
from helpers.run_page import Watched

from benchmarks.costs.bench_report import chromium
from fx_influence.lab.cli import main
from fx_influence.lab.results import EntropyInfluenceResults, load_run

PLAN = {
    "update": {"prompts": "demo/train", "num_prompts": 5, "completions_per_prompt": 4},
    "evaluations": [
        {"prompts": "demo/eval", "num_prompts": 8, "completions_per_prompt": 2},
        {"prompts": "demo/eval", "num_prompts": 3, "completions_per_prompt": 3},
    ],
    "directions": ["full"],
    "eta_multiples": [1.0],
    "scaled_eta_multiples": [],
    "auto_scale": None,
    "seed": 1,
}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main(["run", write_plan(folder, PLAN), "--out", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Open pages; at the end, fail if any of them logged, requested or opened something."""
    visits: list[Watched] = []

    def go(path: Path, **options: Any) -> Any:
        visits.append(Watched(browser, path, **options))
        return visits[-1].page

    yield go
    for watched in visits:
        watched.context.close()
    assert [complaint for watched in visits for complaint in watched.complaints] == []


@pytest.fixture
def page(visit: Any, finished: Path) -> Any:
    return visit(finished / "report" / "index.html")


@pytest.fixture
def run(finished: Path) -> EntropyInfluenceResults:
    return load_run(finished)
