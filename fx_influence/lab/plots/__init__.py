"""Figures of a run: ``fx.lab.plots.waterfall(run)`` and so on, each a matplotlib figure.

They share one style (``plots.style``): blue raises the entropy, vermilion lowers it, influences are in nats per unit
lr. No figure is registered with ``pyplot``; show it in a notebook by ``IPython.display.display``, or call ``savefig``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

# First, because it raises the error that names the remedy where matplotlib is missing.
from fx_influence.lab.plots.style import Figure, save  # isort: split

from fx_influence.lab.plots.correlates import correlates, token_correlates
from fx_influence.lab.plots.distribution import distribution
from fx_influence.lab.plots.eta_sweep import eta_sweep
from fx_influence.lab.plots.ledger import label_sums, ledger
from fx_influence.lab.plots.matrix import matrix
from fx_influence.lab.plots.timeline import health_over_steps, timeline
from fx_influence.lab.plots.tokens import concentration, tokens
from fx_influence.lab.plots.waterfall import waterfall
from fx_influence.lab.results import EntropyInfluenceResults
from fx_influence.lab.training.load import Training

__all__ = [
    "concentration",
    "correlates",
    "distribution",
    "eta_sweep",
    "health_over_steps",
    "label_sums",
    "ledger",
    "matrix",
    "save_figures",
    "save_training_figures",
    "timeline",
    "token_correlates",
    "tokens",
    "waterfall",
]


def save_figures(results: EntropyInfluenceResults, folder: str | Path, evaluation: int = 0) -> list[Path]:
    """Write every figure that the run has the values for, as PNG (150 dpi) and SVG; return the files.

    ``tokens`` is drawn for the rollouts that raise and lower the entropy most. A figure that needs a value that the run
    did not store, such as M, is omitted. The same run gives the same bytes.

    Args:
        results: a finished run.
        folder: directory of the files; it is created if missing.
        evaluation: index of the evaluation batch.
    """
    return _save_all(_figures(results, evaluation), Path(folder))


def save_training_figures(training: Training, folder: str | Path) -> list[Path]:
    """Write ``timeline``, ``ledger``, ``health_over_steps`` and ``label_sums`` of every kind, as PNG and SVG.

    Args:
        training: from ``load_training``.
        folder: directory of the files; it is created if missing.
    """
    figures: dict[str, Callable[[], Figure]] = {
        "timeline": lambda: timeline(training),
        "ledger": lambda: ledger(training),
        # By number, since a kind may have any name.
        **{f"kind_{k:02d}": functools.partial(label_sums, training, kind) for k, kind in enumerate(training.kinds)},
        "health_over_steps": lambda: health_over_steps(training),
    }
    return _save_all(figures, Path(folder))


def _save_all(figures: dict[str, Callable[[], Figure]], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [
        save(drawing, folder / f"{name}{suffix}")
        for name, draw in figures.items()
        if (drawing := _drawn_or_none(draw)) is not None
        for suffix in (".png", ".svg")
    ]


def _figures(results: EntropyInfluenceResults, evaluation: int) -> dict[str, Callable[[], Figure]]:
    influence = results.evaluations[evaluation].arrays["per_sequence"]
    return {
        "waterfall": lambda: waterfall(results, evaluation),
        "waterfall_prompts": lambda: waterfall(results, evaluation, by="prompt"),
        "distribution": lambda: distribution(results, evaluation),
        "correlates": lambda: correlates(results, evaluation),
        "token_correlates": lambda: token_correlates(results, evaluation),
        "eta_sweep": lambda: eta_sweep(results, evaluation),
        "matrix": lambda: matrix(results, evaluation),
        "concentration": lambda: concentration(results, evaluation),
        "tokens_raising": lambda: tokens(results, int(np.argmax(influence)), evaluation),
        "tokens_lowering": lambda: tokens(results, int(np.argmin(influence)), evaluation),
    }


def _drawn_or_none(draw: Callable[[], Figure]) -> Figure | None:
    try:
        return draw()
    except ValueError:
        return None
