"""The API reference builds from the docstrings without a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_api_reference_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    pytest.importorskip("trl", reason="a module that cannot be imported is a warning")
    command = [sys.executable, "docs/build.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    pages = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")}
    assert {"index.html", "fx_influence.html", "fx_influence/losses.html", "fx_influence/interop/trl.html"} <= pages
    assert "fx_influence/lab/plan/batch_request.html" in pages
    front = (tmp_path / "fx_influence.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in front for name in ("influence", "Influence", "adamw_decompose"))
