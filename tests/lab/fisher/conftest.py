"""A finished Fisher run, made once for all tests of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.run_files import FISHER_PLAN, write_plan

from fx_influence.lab.cli import main
from fx_influence.lab.fisher.results import FisherKernelResults, load_fisher_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fisher")
    assert main(["fisher", write_plan(folder, FISHER_PLAN), "--out", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture(scope="session")
def results(finished: Path) -> FisherKernelResults:
    return load_fisher_run(finished)
