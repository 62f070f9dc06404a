"""Figures of a run as images of its page."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fx_influence.lab.results import EntropyInfluenceResults
from fx_influence.lab.training.load import Training

TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
MAX_SVG_BYTES = 400_000
"""Bytes beyond which the PNG of a figure is embedded and not its SVG."""
TITLES = {
    "waterfall": "How the step's change of entropy is made up",
    "waterfall_prompts": "How it is made up, by prompt",
    "distribution": "How the rollouts' influences are distributed",
    "correlates": "The rollouts' influence against their covariates",
    "token_correlates": "The tokens' influence against their covariates",
    "eta_sweep": "The change of entropy at finite steps, beside the first order",
    "matrix": "The contribution of every rollout of E to every influence",
    "concentration": "How concentrated the influence is in few tokens",
    "tokens_raising": "The tokens of the rollout that raises the entropy most",
    "tokens_lowering": "The tokens of the rollout that lowers it most",
    "timeline": "The entropy over the steps, with predicted and measured changes",
    "ledger": "What changed the entropy, summed up over the measured steps",
    "health_over_steps": "What tells how far to trust each step, and what the trainer did",
}


class Figure(NamedTuple):
    """One image: its caption, its bytes as a data URI, and the name of its file."""

    title: str
    source: str
    stem: str = ""


class Figures(NamedTuple):
    """The images or, if a package that draws them is missing, the remedy."""

    images: list[Figure]
    missing: str


NO_FIGURES = Figures([], "")
MISSING = Figures([], "The figures need matplotlib: pip install 'fx-influence[report]'")


def draw_figures(results: EntropyInfluenceResults, folder: Path) -> Figures:
    """Draw the figures of the first E into ``folder`` and return each in one of the formats that it was saved in."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        from fx_influence.lab.plots import save_figures

        paths = save_figures(results, folder)
    except ImportError:
        return MISSING
    return Figures(embedded(paths), "")


def draw_training_figures(training: Training, folder: Path) -> Figures:
    """Draw the figures of a training run into ``folder``, as ``draw_figures`` does those of a run."""
    try:
        from fx_influence.lab.plots import save_training_figures

        paths = save_training_figures(training, folder)
    except ImportError:
        return MISSING
    return Figures(embedded(paths), "")


def embedded(paths: Iterable[Path]) -> list[Figure]:
    """Return files as figures in their order: of two formats of one figure the SVG, unless it is large."""
    by_stem: dict[str, Path] = {}
    for path in sorted((p for p in paths if p.suffix in TYPES), key=_rank):
        by_stem.setdefault(path.stem, path)
    order = list(dict.fromkeys(path.stem for path in paths if path.stem in by_stem))
    return [Figure(_title(stem), _data_uri(by_stem[stem]), stem) for stem in order]


def _rank(path: Path) -> int:
    large = path.suffix == ".svg" and path.stat().st_size > MAX_SVG_BYTES
    return 2 if large else {".svg": 0, ".png": 1}[path.suffix]


def _title(stem: str) -> str:
    words = stem.replace("_", " ")
    return TITLES.get(stem, words[:1].upper() + words[1:])


def _data_uri(path: Path) -> str:
    return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
