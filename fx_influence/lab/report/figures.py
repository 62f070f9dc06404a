"""The figures of a run inside its page."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fx_influence.lab.results import EntropyInfluenceResults

TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
HEAVY = 400_000
"""Bytes from which a drawing of many marks is embedded as pixels."""
TITLES = {
    "waterfall": "How the step's change of entropy is made up",
    "waterfall_prompts": "How it is made up, by prompt",
    "distribution": "How the rollouts' influences are distributed",
    "correlates": "The rollouts' influence against what is known of them",
    "token_correlates": "The tokens' influence against what is known of them",
    "eta_sweep": "The change of entropy at finite steps, beside the first order",
    "matrix": "The part of every rollout of E in every influence",
    "concentration": "How few tokens hold most of the influence",
    "tokens_raising": "The tokens of the rollout that raises the entropy most",
    "tokens_lowering": "The tokens of the rollout that lowers it most",
}


class Figure(NamedTuple):
    """One image: what it shows, in words, and its bytes as a data URI."""

    title: str
    source: str


class Figures(NamedTuple):
    """The images, and where there are none for want of a package, the remedy."""

    images: list[Figure]
    missing: str


NO_FIGURES = Figures([], "")


def draw_figures(results: EntropyInfluenceResults, folder: Path) -> Figures:
    """Draw the figures of the first E into ``folder`` and take up one of each, of the formats that it was saved in."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        from fx_influence.lab.plots import save_figures

        paths = save_figures(results, folder)
    except ImportError:
        return Figures([], "The figures need matplotlib: pip install 'fx-influence[report]'")
    return Figures(embedded(paths), "")


def embedded(paths: Iterable[Path]) -> list[Figure]:
    """Files as figures in their order: of those that differ in the ending the drawing, unless it is heavy."""
    chosen: dict[str, Path] = {}
    for path in sorted((p for p in paths if p.suffix in TYPES), key=_rank):
        chosen.setdefault(path.stem, path)
    order = list(dict.fromkeys(path.stem for path in paths if path.stem in chosen))
    return [Figure(_title(stem), _data_uri(chosen[stem])) for stem in order]


def _rank(path: Path) -> int:
    heavy = path.suffix == ".svg" and path.stat().st_size > HEAVY
    return 2 if heavy else {".svg": 0, ".png": 1}[path.suffix]


def _title(stem: str) -> str:
    words = stem.replace("_", " ")
    return TITLES.get(stem, words[:1].upper() + words[1:])


def _data_uri(path: Path) -> str:
    return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
