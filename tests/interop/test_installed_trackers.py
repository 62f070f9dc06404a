"""Tables, alerts and panels of measured steps in the packages trackio and W&B, offline.

They are not among the development dependencies, since trackio asks for an older pillow: ``make extra`` installs
``tests/extra.txt`` beside them. The tests fail without the packages; deselect them by ``-m "not extra"``.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.trackers import hostile_entry

from fx_influence.interop.trackers import panel_metrics, report_step, workspace

pytestmark = [pytest.mark.extra, pytest.mark.filterwarnings("ignore")]


def test_wandb_takes_table_and_alert_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = importlib.import_module("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="test", dir=os.fspath(tmp_path))
    alert, sent = wandb.alert, list[str]()

    def recorded_alert(**options: Any) -> None:
        sent.append(options["title"])
        alert(**options)

    monkeypatch.setattr(wandb, "alert", recorded_alert)
    report_step(hostile_entry(total=-0.01, measured=-0.01), ["wandb"], set())
    wandb.log({"train/global_step": 1})
    run.finish()
    [file] = tmp_path.rglob("*.table.json")
    assert '"columns":["step","id","influence"' in file.read_text(encoding="utf-8").replace(" ", "")
    assert sent == ["Entropy falls fast"]


TRACKIO = """
import trackio
from helpers.trackers import hostile_entry
from fx_influence.interop.trackers import report_step
trackio.init(project="test", embed=False, auto_log_cpu=False, auto_log_gpu=False)
report_step(hostile_entry(3, measured=-0.01), ["trackio"], set())
trackio.finish()
"""


def test_trackio_takes_table_and_alert(tmp_path: Path) -> None:
    """Check trackio in a fresh process: it reads where to store when it is imported, which transformers does."""
    environment = {**os.environ, "TRACKIO_DIR": os.fspath(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", TRACKIO], env=environment, check=True, timeout=120)
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"Entropy falls fast" in stored
    assert b"entropy_influence/strongest" in stored


def test_workspace_has_one_section_of_few_panels() -> None:
    [section] = workspace("entity", "project").sections
    assert len(section.panels) == len(panel_metrics())
