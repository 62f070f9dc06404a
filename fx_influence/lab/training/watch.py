"""Follow the ledger of a training run in a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fx_influence.core.display import printable
from fx_influence.interop.ledger.file import LEDGER, STEP
from fx_influence.lab.console.training_tables import print_training, step_line
from fx_influence.lab.training.health import training_health
from fx_influence.lab.training.load import Training, load_training

INTERVAL = 2.0
"""Seconds between two looks at the file."""


def sleep() -> None:
    """Wait for the time between two looks at the file."""
    time.sleep(INTERVAL)


def watch_training(path: Path, console: Console, once: bool = False, wait: Callable[[], None] = sleep) -> None:
    """Print the steps of a ledger and its account, then each step as it is added, until interrupted.

    A check that begins to need attention is printed after the step with which it does.

    Args:
        path: directory of the measured steps.
        console: where to print.
        once: whether to end after what the ledger has now.
        wait: called before each further look.

    Raises:
        RunDirectoryError: where there is no ledger yet, or a damaged one.
    """
    training, size = load_training(path), _size(path)
    for k in range(len(training.steps[STEP])):
        _print_line(step_line(training, k), console)
    print_training(training, console)
    alerts = _alerts(training)
    while not once:
        wait()
        if _size(path) == size:
            continue
        # After a resumption the ledger may have lost steps; those that it has measured again are new.
        size, printed = _size(path), {step_line(training, k) for k in range(len(training.steps[STEP]))}
        training = load_training(path)
        lines = [step_line(training, k) for k in range(len(training.steps[STEP]))]
        for line in lines:
            if line not in printed:
                _print_line(line, console)
        before, alerts = alerts, _alerts(training)
        for name, text in alerts.items():
            if name not in before:
                _print_line(f"! {name}: {text}", console)


def _print_line(text: str, console: Console) -> None:
    console.print(Text(printable(text)), soft_wrap=True)


def _alerts(training: Training) -> dict[str, str]:
    return {finding.name: finding.text for finding in training_health(training) if finding.level == "attention"}


def _size(path: Path) -> int:
    return (path / LEDGER).stat().st_size
