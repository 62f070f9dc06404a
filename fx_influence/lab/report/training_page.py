"""``report/index.html`` of a training run: what its steps did to the entropy, in one file that opens from disk.

The page has no script: whatever a rollout's text holds, it is text.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

import numpy as np

from fx_influence.core.display import printable
from fx_influence.interop.ledger.entry import DEGREES
from fx_influence.interop.ledger.file import STEP
from fx_influence.interop.runtime.run_files import raise_if_damaged
from fx_influence.lab.console.window_tables import window_table
from fx_influence.lab.report.figures import NO_FIGURES, Figure, draw_training_figures
from fx_influence.lab.report.page import FOLDER, MARKS, SOURCES, render, write_page, write_report
from fx_influence.lab.report.training_tables import (
    account_table,
    kinds_table,
    lifetime_table,
    prompts_table,
    sources_table,
    step_directory,
    step_page,
    steps_table,
    strongest_of_run,
    strongest_rollouts,
    training_facts,
)
from fx_influence.lab.results import load_run
from fx_influence.lab.training.health import training_health
from fx_influence.lab.training.load import Training
from fx_influence.lab.training.sentences import entropy_unit, training_sentences

STYLES = ("explorer.css", "training.css")
"""Style sheets in their order in the page."""

FIRST = ("timeline", "ledger")
"""Figures of the first screen; the others are below."""


def write_training_report(training: Training, figures: bool = True) -> Path:
    """Write the page of a training run into ``report/`` of its directory and return its path.

    The steps of its strongest rollouts get pages too, without figures, where they have none and their files are there.

    Args:
        training: from ``load_training``; the run may be under way.
        figures: whether to draw the figures, which are also written to ``report/figures``.

    Raises:
        ImportError: if jinja2 is missing; the message names the remedy.
        OSError: if the page cannot be written.

    Example, after a training run: ``write_training_report(load_training("runs/grpo/entropy_influence"))``.
    """
    for step in strongest_steps(training) - steps_with_page(training):
        if (training.path / step_directory(step)).is_dir():
            write_report(load_run(training.path / step_directory(step)), figures=False)
    return write_page(training.path, lambda: training_page(training, figures))


def strongest_steps(training: Training) -> set[int]:
    """Return the numbers of the steps of the run's strongest rollouts."""
    return {rollout[STEP] for rollout in strongest_of_run(training)}


def steps_with_page(training: Training) -> set[int]:
    """Return the numbers of the measured steps that have a page in their directories."""
    return {step for step in training.steps[STEP].tolist() if (training.path / step_page(step)).is_file()}


def training_page(
    training: Training, figures: bool = True, pages: Set[int] | None = None, folder: Path | None = None
) -> str:
    """Return the page as text. Errors are those of ``write_training_report``.

    Args:
        training: from ``load_training``; the run may be under way.
        figures: whether to draw the figures.
        pages: numbers of the steps whose pages are linked; None takes those that have one.
        folder: directory of the figures' files; None takes ``report/figures`` of the training run.
    """
    drawn = draw_training_figures(training, folder or training.path / FOLDER / "figures") if figures else NO_FIGURES
    with raise_if_damaged(training.path):
        findings = training_health(training)
        rollouts_unit, rollouts = strongest_rollouts(training, steps_with_page(training) if pages is None else pages)
        heads, rows = steps_table(training)
        return render(
            "training.html.j2",
            "\n".join((SOURCES / name).read_text(encoding="utf-8") for name in STYLES),
            None,
            title=printable(training.path.resolve().name),
            parent=printable(training.path.resolve().parent.name),
            facts=training_facts(training),
            sentences=[printable(sentence) for sentence in training_sentences(training, findings)],
            unit=entropy_unit(training),
            assumed=int(np.isnan(training.steps[DEGREES]).sum()),
            account=account_table(training),
            kinds=kinds_table(training),
            sources=sources_table(training),
            findings=findings,
            marks=MARKS,
            first=[x for x in drawn.images if x.stem in FIRST],
            below=[_titled(x, training) for x in drawn.images if x.stem not in FIRST],
            missing=drawn.missing,
            lifetime=lifetime_table(training),
            prompts=prompts_table(training),
            windows=window_table(training),
            rollouts_unit=rollouts_unit,
            rollouts=rollouts,
            heads=heads,
            rows=rows,
        )


def _titled(figure: Figure, training: Training) -> Figure:
    """Return a figure of a kind with the kind in its caption."""
    if not figure.stem.startswith("kind_"):
        return figure
    kind = training.kinds[int(figure.stem.removeprefix("kind_"))]
    return figure._replace(title=f"Influence by {printable(kind)}, summed up over the measured steps")
