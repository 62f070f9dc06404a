"""One style for all figures: colours that the colour-blind tell apart, text drawn as it is, bytes that repeat."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ParamSpec

from fx_influence.lab.console.column_table import printable

try:
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure as Figure
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font
    from matplotlib.text import Text
except ImportError as error:
    raise ImportError("figures need matplotlib: pip install 'fx-influence[report]'") from error

BLACK, GREY, BLUE, VERMILION = "#000000", "#767676", "#0072B2", "#D55E00"
GREEN, ORANGE = "#009E73", "#E69F00"
"""Okabe and Ito's palette, jfly.uni-koeln.de/color; grey is theirs of text."""
RAISES, LOWERS = BLUE, VERMILION
"""What raises the entropy, and what lowers it, in every figure."""
DIVERGING = LinearSegmentedColormap.from_list("entropy", ["#8A3A00", VERMILION, "#F7F7F7", BLUE, "#00406B"])
SANS, MONO = "DejaVu Sans", "DejaVu Sans Mono"
"""They come with matplotlib, so that figures are the same everywhere."""
UNIT = "nats per unit lr"

RC: dict[str, Any] = {
    "font.family": SANS,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "svg.hashsalt": "fx_influence",
    "svg.fonttype": "path",
}
P = ParamSpec("P")


def style() -> AbstractContextManager[None]:
    """The style while it lasts, whatever the user's own settings."""
    context: AbstractContextManager[None] = matplotlib.style.context(RC, after_reset=True)
    return context


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """A figure drawn in the style."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style():
            return draw(*args, **kwargs)

    return drawn


def figure(width: float, height: float) -> Figure:
    """An empty figure in inches that no global state knows of."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def drawable(text: str, font: str = SANS) -> str:
    """Untrusted text with what is no printable character, or has no glyph in ``font``, escaped."""
    glyphs = _font(font)
    return "".join(c if glyphs.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in printable(text))


@functools.cache
def _font(name: str) -> FT2Font:
    return FT2Font(findfont(name))


def literal(text: Text) -> Text:
    """A label whose dollar signs are dollar signs."""
    text.set_parse_math(False)
    return text


def zero_line(axes: Axes, horizontal: bool = True) -> None:
    (axes.axhline if horizontal else axes.axvline)(0, color=BLACK, linewidth=0.8)


def save(made: Figure, path: Path) -> Path:
    """Write a figure as PNG or SVG, by the ending; the same figure gives the same bytes."""
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with style():
        made.savefig(path, metadata=metadata)
    return path
