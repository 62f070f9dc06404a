"""Show measured steps in trackio and W&B: a table of the strongest rollouts a step, alerts, a section of panels.

The functions take an entry of the ledger, ``ledger_entry``'s result or a line of ``read_ledger``, and write to the run
that the trainer or the loop has begun in the tracker. Texts of rollouts are untrusted: they are shown literally.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fx_influence.attribution.display import ILL_CONDITIONED
from fx_influence.core.display import printable
from fx_influence.estimators.consistency import ROUNDING_WARNED
from fx_influence.estimators.stderr import interval_half_width
from fx_influence.interop.ledger.entry import ASSUMED_DEGREES, DEGREES, MEASURED_DEGREES
from fx_influence.interop.live.guard import reason
from fx_influence.interop.live.metrics import LOGGED_FIRST, LOGGED_LAST, PREFIX
from fx_influence.interop.live.precision import MAX_STEP_ROUNDING

TRACKERS = ("trackio", "wandb")
"""Trackers that get tables and alerts, as ``report_to`` names them."""

MAX_FALL = 0.005
"""Share of the entropy that a step may take before there is an alert: at this pace it is used up in 200 steps."""

MAX_RESIDUAL = 1e-4
"""Largest residual of the identity, over the sum of |influence|."""

MIN_ESS = 0.5
"""Smallest effective sample size after the step, as a share of E's rollouts."""

MAX_OFF = 0.5
"""Largest relative difference of the predicted change from the measured one, where error bars determine both."""

MAX_PANELS = 12
"""Panels of the section that ``workspace`` makes."""

COLUMNS = ("step", "id", "influence", "stderr", "reward", "advantage", "length", "finished", "source")
TEXTS = ("prompt", "completion")
"""Columns of the table of the strongest rollouts, in nats for the step; those of texts come last."""


class Alert(NamedTuple):
    """A finding on a step that its user should see now: a title of at most 63 characters, and a sentence."""

    title: str
    text: str


def step_alerts(entry: Mapping[str, Any], max_fall: float = MAX_FALL) -> list[Alert]:
    """Return the alerts on one measured step.

    Args:
        entry: of the ledger.
        max_fall: share of the entropy that the step may take.

    Example:
        >>> figures = {"entropy": 0.5, "measured": -0.02, "measured_stderr": 1e-3, "momentum": -0.015}
        >>> [alert] = step_alerts({"step": 7, "figures": figures})
        >>> alert.text
        'Step 7 lowers the entropy of 0.5 nats by 0.02 ± 0.001; momentum lowers it most, by 0.015.'
    """
    figures = {name: math.nan if x is None else float(x) for name, x in entry["figures"].items()}

    def value(name: str) -> float:
        return figures.get(name, math.nan)

    def half_width(name: str, degrees: str = DEGREES) -> float:
        return interval_half_width(value(name), figures.get(degrees, ASSUMED_DEGREES))

    absolute = value("absolute") or math.nan
    measured_error = half_width("measured_stderr", MEASURED_DEGREES)
    told = abs(value("total")) > half_width("stderr") and abs(value("measured")) > measured_error
    difference = abs(value("total") - value("measured"))
    off = difference / abs(value("measured") or math.nan)
    told = told and not difference <= half_width("unexplained_stderr")
    step = f"Step {entry['step']}"
    # A comparison with NaN, a figure that the step does not have, is false.
    findings = [
        (
            -value("measured") > max(max_fall * value("entropy"), measured_error),
            Alert("Entropy falls fast", _fall(entry, figures)),
        ),
        (
            abs(value("residual")) / absolute > MAX_RESIDUAL,
            Alert(
                "Forward and reverse mode differ",
                f"{step}: by {abs(value('residual')) / absolute:.1e} of the sum of |influence|; do not trust its "
                "influences. Something was computed in low precision.",
            ),
        ),
        (
            value("rounding") / absolute > ROUNDING_WARNED,
            Alert(
                "Rounding of the influences",
                f"{step}: two methods of computing the influences differ by {value('rounding') / absolute:.1e} of the "
                "sum of |influence|; mistrust smaller ones.",
            ),
        ),
        (
            value("step_rounding") > MAX_STEP_ROUNDING,
            Alert(
                "Rounding of the weights",
                f"{step}: rounding swallows {value('step_rounding'):.2g} of it. Train weights in float32.",
            ),
        ),
        (
            value("conditioning") > ILL_CONDITIONED,
            Alert(
                "Ill-conditioned influences",
                f"{step}: {value('conditioning'):.0%} of the sum of |influence| rests on denominators that AdamW has "
                "from this very gradient; read the total and sums over many rollouts.",
            ),
        ),
        (
            value("ess") < MIN_ESS * value("evaluation_count"),
            Alert(
                "E is too small",
                f"{step}: importance weights leave {value('ess'):.0f} of E's {value('evaluation_count'):.0f} rollouts, "
                "so the measured change rests on too few.",
            ),
        ),
        (
            bool(told) and off > MAX_OFF,
            Alert(
                "The first order does not hold",
                f"{step}: predicted {value('total'):+.2g} nats, measured {value('measured'):+.2g}. The step is longer "
                "than the first order holds.",
            ),
        ),
    ]
    return [alert for applies, alert in findings if applies]


def _fall(entry: Mapping[str, Any], figures: Mapping[str, float]) -> str:
    """Return the sentence on a fall of the entropy, with its main cause: a kind of token, or a term beside rollouts."""
    regions = entry.get("sums", {}).get("region") or [["the rollouts", figures.get("rollouts", math.nan)]]
    causes = {str(label): float(x) for label, x, *_ in regions if x is not None}
    causes |= {name: figures[name] for name in ("momentum", "weight_decay", "unattributed") if name in figures}
    known = {name.replace("_", " "): x for name, x in causes.items() if x < 0}
    error = figures.get("measured_stderr", math.nan)
    size = f"{-figures.get('measured', math.nan):.2g}" + (f" ± {error:.1g}" if math.isfinite(error) else "")
    text = f"Step {entry['step']} lowers the entropy of {figures.get('entropy', math.nan):.3g} nats by {size}"
    if not known:
        return f"{text}."
    lowest = min(known, key=lambda name: known[name])
    return f"{text}; {lowest} lowers it most, by {-known[lowest]:.2g}."


def rollout_rows(entry: Mapping[str, Any], literal: Callable[[str], str] = printable) -> list[list[Any]]:
    """Return the rows of the table of a step's strongest rollouts, in the order of ``COLUMNS`` and ``TEXTS``.

    Args:
        entry: of the ledger.
        literal: makes a text one that the tracker shows as it is.
    """
    rows = []
    for rollout in entry.get("strongest", []):
        values = {"step": entry["step"], **rollout}
        cells = [values.get(name) for name in COLUMNS]
        cells = [literal(x) if isinstance(x, str) else x for x in cells]
        rows.append([*cells, *(literal(str(values.get(name, ""))) for name in TEXTS)])
    return rows


def markdown_literal(text: str) -> str:
    """Return a text that Markdown shows as it is: trackio reads the texts of a table as Markdown.

    Example:
        >>> markdown_literal("![x](http://a) <b>")
        '\\\\!\\\\[x\\\\]\\\\(http\\\\:\\\\/\\\\/a\\\\) \\\\<b\\\\>'
    """
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", printable(text))


def report_step(
    entry: Mapping[str, Any], report_to: Iterable[str], alerted: set[str], max_fall: float = MAX_FALL
) -> None:
    """Write a measured step's strongest rollouts and its alerts to the trackers in which a run is under way.

    Args:
        entry: of the ledger.
        report_to: names of trackers, of which ``TRACKERS`` are written to.
        alerted: titles of alerts that were sent, each of which is sent once; those of this step are added.
        max_fall: as for ``step_alerts``.

    Example, in a loop with ``fx.attach(..., directory=steps)``:
    ``report_step(read_ledger(steps)[-1], ["wandb"], alerted)``.
    """
    alerts = [alert for alert in step_alerts(entry, max_fall) if alert.title not in alerted]
    for name in report_to:
        if name in TRACKERS and (tracker := _with_run(name)) is not None:
            _log_table(name, tracker, entry)
            for alert in alerts:
                tracker.alert(title=alert.title, text=alert.text, level=tracker.AlertLevel.WARN)
    alerted.update(alert.title for alert in alerts)


class TrackerReports:
    """Write the measured steps of a training run to its trackers; the first fault is a warning.

    Args:
        max_fall: as for ``step_alerts``.
        warn: called with a sentence that the user should read.
    """

    def __init__(self, max_fall: float, warn: Callable[[str], None]) -> None:
        self._max_fall, self._warn = max_fall, warn
        self._alerted, self._failed = set[str](), False

    def write(self, entry: Mapping[str, Any], report_to: Iterable[str]) -> None:
        """Write a step, of the ledger, to the trackers of these names."""
        try:
            report_step(entry, report_to, self._alerted, self._max_fall)
        except Exception as error:
            if not self._failed:
                self._warn(f"step {entry['step']} and others may be missing in the tracker: {reason(error)}")
            self._failed = True


def _with_run(name: str) -> Any:
    """Return a tracker's module, None where it has no run."""
    tracker = importlib.import_module(name)
    run = tracker.run if name == "wandb" else tracker.context_vars.current_run.get()
    return None if run is None else tracker


def _log_table(name: str, tracker: Any, entry: Mapping[str, Any]) -> None:
    rows = rollout_rows(entry, printable if name == "wandb" else markdown_literal)
    if not rows:
        return
    table = {f"{PREFIX}strongest": tracker.Table(columns=[*COLUMNS, *TEXTS], data=rows)}
    if name == "wandb":
        # It goes with what the trainer logs next, so that the trainer's own steps stay as they are.
        tracker.log(table, commit=False)
    else:
        tracker.log(table, step=entry["step"])


def workspace(entity: str, project: str, name: str = "Entropy influence") -> Any:
    """Return a W&B workspace with one section of at most 12 panels; its ``save()`` stores it as a view of the project.

    trackio has no saved views.

    Args:
        entity: of the project.
        project: with the training runs.
        name: of the view.

    Raises:
        ImportError: naming the remedy, where wandb-workspaces is missing.
    """
    try:
        workspaces = importlib.import_module("wandb_workspaces.workspaces")
        reports = importlib.import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise ImportError("a W&B view needs wandb-workspaces: pip install wandb-workspaces") from error
    panels = [
        reports.LinePlot(title=title, x="train/global_step", y=[f"train/{PREFIX}{metric}" for metric in metrics])
        for title, metrics in panel_metrics().items()
    ]
    section = workspaces.Section(name=name, panels=panels, is_open=True)
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=[section])


def panel_metrics() -> dict[str, Sequence[str]]:
    """Return the metrics of each panel by its title: all that are logged for every training run, in few panels.

    Example:
        >>> len(panel_metrics()) <= MAX_PANELS
        True
    """
    errors = [name for name in (*LOGGED_FIRST, *LOGGED_LAST) if name.endswith("stderr")]
    regions = [name for name in LOGGED_FIRST if name.startswith(("positive", "negative")) and name not in errors]
    return {
        "Change of entropy, predicted and measured": ["total", "measured"],
        "By momentum and by the rollouts": ["momentum", "rollouts"],
        "By likely and unlikely tokens": regions,
        "Entropy": ["entropy"],
        "Standard errors": errors,
        "Through the rollouts' own prompts": ["self_influence"],
        "Share on fresh denominators": ["conditioning"],
    }
