"""A training run with a tracker in its ``report_to``: tables, alerts, and a tracker that fails."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.trackers import StandIn
from helpers.trl_runs import measure_training

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def trainers_own_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the trainer, which imported no tracker, from looking for the stand-in."""
    monkeypatch.setattr("trl.extras.profiling.is_wandb_available", lambda: False)


def report_to_wandb(training: Any) -> None:
    """Name the tracker after the trainer has made its callbacks, so that it has none of the package."""
    training.args.report_to = ["wandb"]


def test_tracker_of_a_training_gets_tables_and_alerts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    measured = measure_training(tmp_path, 2, prepare=report_to_wandb)
    tables = [metrics["entropy_influence/strongest"] for metrics, _ in tracker.logs]
    assert [{row[0] for row in table["data"]} for table in tables] == [{1}, {2}]
    assert "Ill-conditioned influences" in [title for title, _, _ in tracker.alerts], "a fresh optimizer"
    assert [step["step"] for step in measured.history] == [1, 2]


def test_failing_tracker_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(StandIn):
        def log(self, metrics: dict[str, Any], **options: Any) -> None:
            raise ConnectionError("no network")

    texts: list[str] = []
    monkeypatch.setattr("fx_influence.interop.trl.callback.warn", texts.append)
    monkeypatch.setitem(sys.modules, "wandb", Failing())
    measured = measure_training(tmp_path, 2, prepare=report_to_wandb)
    assert [x for x in texts if "tracker" in x] == [
        "step 1 and others may be missing in the tracker: ConnectionError: no network"
    ]
    assert [step["step"] for step in measured.history] == [1, 2]
    assert (tmp_path / "entropy_influence" / "step_000002").is_dir()
