"""Style of all figures: colours that the colour-blind distinguish, literal text, reproducible bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ParamSpec

from fx_influence.core.display import printable

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
SKY, PURPLE, YELLOW = "#56B4E9", "#CC79A7", "#F0E442"
"""Okabe and Ito's palette, jfly.uni-koeln.de/color; grey is their colour of text."""
RAISES, LOWERS = BLUE, VERMILION
"""Colours of positive and negative influence in every figure."""
DIVERGING = LinearSegmentedColormap.from_list("entropy", ["#8A3A00", VERMILION, "#F7F7F7", BLUE, "#00406B"])
SANS, MONO = "DejaVu Sans", "DejaVu Sans Mono"
"""Fonts that matplotlib installs, so that figures are the same everywhere."""
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
    """Return a context in which matplotlib has this style, whatever the user's settings."""
    context: AbstractContextManager[None] = matplotlib.style.context(RC, after_reset=True)
    return context


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorate a function so that it draws its figure in the style."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style():
            return draw(*args, **kwargs)

    return wrapper


def figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches, not registered in any global state."""
    empty = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(empty)
    return empty


def drawable(text: str, font: str = SANS) -> str:
    """Return untrusted text with characters escaped that are not printable or have no glyph in ``font``."""
    glyphs = _font(font)
    return "".join(c if glyphs.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in printable(text))


@functools.cache
def _font(name: str) -> FT2Font:
    return FT2Font(findfont(name))


def literal(text: Text) -> Text:
    """Turn off TeX in a label, so that its dollar signs are drawn."""
    text.set_parse_math(False)
    return text


def zero_line(axes: Axes, horizontal: bool = True) -> None:
    """Draw the axis at 0."""
    (axes.axhline if horizontal else axes.axvline)(0, color=BLACK, linewidth=0.8)


def save(drawing: Figure, path: Path) -> Path:
    """Write a figure as PNG or SVG, by the suffix; the same figure gives the same bytes."""
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with style():
        drawing.savefig(path, metadata=metadata)
    return path
