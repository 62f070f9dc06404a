"""Tables and alerts of measured steps in trackio and W&B, against stand-ins.

The stand-ins follow trackio 0.43 and wandb 0.31: ``log``, ``alert``, ``Table`` and where a run is.
``test_installed_trackers.py`` has the tests of the packages.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from helpers.trackers import StandIn, hostile_entry

from fx_influence.interop.live.metrics import LOGGED_FIRST, LOGGED_LAST
from fx_influence.interop.trackers import (
    COLUMNS,
    MAX_PANELS,
    TEXTS,
    markdown_literal,
    panel_metrics,
    report_step,
    rollout_rows,
    step_alerts,
    workspace,
)


def titles(**figures: Any) -> list[str]:
    return [alert.title for alert in step_alerts(hostile_entry(**figures))]


def test_step_without_a_finding_has_no_alert() -> None:
    assert titles() == []


@pytest.mark.parametrize(
    ("title", "above", "below"),
    [
        ("Entropy falls fast", {"measured": -0.0041}, {"measured": -0.0039}),
        ("Forward and reverse mode differ", {"residual": -1.1e-7}, {"residual": -0.9e-7}),
        ("Rounding of the influences", {"rounding": 2e-4}, {"rounding": None}),
        ("Rounding of the weights", {"step_rounding": 0.11}, {"step_rounding": 0.09}),
        ("Ill-conditioned influences", {"conditioning": 0.51}, {"conditioning": 0.49}),
        ("E is too small", {"ess": 63.0}, {"ess": 65.0}),
        ("The first order does not hold", {"total": -2e-3, "measured": -1.3e-3}, {"total": -2e-3, "measured": -1.4e-3}),
    ],
)
def test_alert_is_on_one_side_of_its_bound(
    title: str, above: dict[str, float | None], below: dict[str, float | None]
) -> None:
    assert title in titles(**above)
    assert title not in titles(**below)
    assert len(title) < 64, "W&B takes no longer one"


def test_alerts_need_error_bars_that_determine_them() -> None:
    assert "Entropy falls fast" not in titles(measured=-0.01, measured_stderr=0.006)
    assert "The first order does not hold" not in titles(total=-2e-3, measured=-1e-3, stderr=1.1e-3)
    far = {"total": -2e-3, "measured": -1e-3}
    assert "The first order does not hold" in titles(**far, unexplained_stderr=0.4e-3)
    assert "The first order does not hold" not in titles(**far, unexplained_stderr=0.6e-3)
    assert [a for a in step_alerts({"step": 1, "figures": {}}) if a.title] == []


def test_alerts_take_the_degrees_of_their_errors() -> None:
    """2.3 standard errors are outside of a 95% interval with 15 degrees, at 2.131, and inside with 6, at 2.447."""
    title = "Entropy falls fast"
    beyond: dict[str, Any] = {"measured": -0.0046, "measured_stderr": 0.002}
    assert title in titles(**beyond)
    assert title not in titles(**beyond, measured_degrees_of_freedom=6.0)
    older = hostile_entry(**beyond)
    del older["figures"]["measured_degrees_of_freedom"]
    assert title not in [alert.title for alert in step_alerts(older)], "six are assumed"


def test_fall_names_its_main_cause() -> None:
    made = hostile_entry(measured=-0.01, momentum=-2e-3)
    made["sums"]["region"] = [["A<0 unlikely", -3e-3, 1e-4, 9, 0.5], ["A>0 likely", 2e-3, None, 9, 0.5]]
    assert step_alerts(made)[0].text.endswith("A<0 unlikely lowers it most, by 0.003.")
    made["figures"]["momentum"] = -4e-3
    assert step_alerts(made)[0].text.endswith("momentum lowers it most, by 0.004.")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_table_has_the_strongest_rollouts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, made = StandIn(), hostile_entry(7)
    monkeypatch.setitem(sys.modules, name, tracker)
    report_step(made, ["tensorboard", name], set())
    [(metrics, options)] = tracker.logs
    # W&B's own step stays that of the trainer; trackio has no such option.
    assert options == ({"commit": False} if name == "wandb" else {"step": 7})
    table = metrics["entropy_influence/strongest"]
    assert table["columns"] == [*COLUMNS, *TEXTS]
    for row, rollout in zip(table["data"], made["strongest"], strict=True):
        values = dict(zip(table["columns"], row, strict=True))
        assert values["step"] == 7
        for column in ("influence", "stderr", "reward", "length", "finished"):
            assert values[column] == rollout[column]
        assert values["completion"].isprintable()


def test_texts_are_literal_in_markdown() -> None:
    [text] = {row[-2] for row in rollout_rows(hostile_entry(), markdown_literal)}
    assert text.isprintable()
    plain = text.replace("\\\\", "")
    unescaped = [c for k, c in enumerate(plain) if c in "![]()<>#`" and plain[k - 1] != "\\"]
    assert unescaped == []
    text.encode()


def test_alerts_are_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, alerted = StandIn(), set[str]()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    for step in (1, 2):
        report_step(hostile_entry(step, total=-0.01, measured=-0.01, conditioning=0.9), ["wandb"], alerted)
    assert [title for title, _, _ in tracker.alerts] == ["Entropy falls fast", "Ill-conditioned influences"]
    assert {level for _, _, level in tracker.alerts} == {"warn"}
    assert tracker.alerts[0][1].startswith("Step 1 lowers")
    report_step(hostile_entry(3, total=-0.01, measured=-0.01), ["wandb"], set(), max_fall=0.1)
    assert len(tracker.alerts) == 2


def test_tracker_without_a_run_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "trackio"):
        tracker = StandIn(has_run=False)
        monkeypatch.setitem(sys.modules, name, tracker)
        report_step(hostile_entry(), [name], set())
        assert tracker.logs == []


def test_panels_hold_every_logged_metric_once() -> None:
    shown = [name for names in panel_metrics().values() for name in names]
    assert sorted(shown) == sorted({*LOGGED_FIRST, *LOGGED_LAST})
    assert len(panel_metrics()) <= MAX_PANELS


def test_workspace_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ImportError, match="pip install wandb-workspaces"):
        workspace("entity", "project")
