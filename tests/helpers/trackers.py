"""A stand-in for trackio and W&B, after the sources of trackio 0.43 and wandb 0.31, and a step with hostile texts."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import numpy as np

from helpers.made_trainings import made_entry

HOSTILE = ("![x](https://example.com/x.png) <img src=x onerror=alert(1)>\n# h `a` \ud800\u202e",)


def hostile_entry(step: int = 1, **figures: Any) -> dict[str, Any]:
    """Return the entry of a step whose rollouts have hostile texts.

    Args:
        step: its number.
        **figures: that replace those of the made step.
    """
    made = made_entry(step, np.random.default_rng(0), 0.8, HOSTILE)
    return {**made, "figures": {**made["figures"], **figures}}


class StandIn:
    """A tracker with a run, that keeps what it is given."""

    def __init__(self, has_run: bool = True) -> None:
        # Trainers look for a tracker's package by the spec of the module.
        self.__spec__ = ModuleSpec("wandb", None)
        run = SimpleNamespace() if has_run else None
        self.run, self.context_vars = run, SimpleNamespace(current_run=SimpleNamespace(get=lambda: run))
        self.AlertLevel = SimpleNamespace(WARN="warn")
        self.logs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.alerts: list[tuple[str, str, str]] = []

    def Table(self, columns: list[str], data: list[list[Any]]) -> dict[str, Any]:
        return {"columns": columns, "data": data}

    def log(self, metrics: dict[str, Any], **options: Any) -> None:
        self.logs.append((metrics, options))

    def alert(self, title: str, text: str, level: str) -> None:
        self.alerts.append((title, text, level))
