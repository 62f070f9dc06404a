"""A finished run of the main experiment, made once for all tests of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.run_files import (
    ENTROPY_PLAN,
    write_plan,
)

from fx_influence.lab.cli import main


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main(["run", write_plan(folder, ENTROPY_PLAN), "--out", str(folder / "out")]) == 0
    return folder / "out"
