"""Token influences: their concentration, and a completion shaded by them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fx_influence.lab.analysis.covariates import Tokens, completion_mask
from fx_influence.lab.analysis.token_sums import FRACTIONS
from fx_influence.lab.analysis.token_sums import concentration as curves_of
from fx_influence.lab.plots.style import (
    BLACK,
    DIVERGING,
    GREY,
    LOWERS,
    MONO,
    RAISES,
    UNIT,
    drawable,
    figure,
    literal,
    styled,
)
from fx_influence.lab.results import EntropyInfluenceResults, displayed_prompt

LINE_WIDTH = 92
"""Characters in a line."""
MAX_TOKENS = 1500
FONT_SIZE = 9.0
"""Points."""


@styled
def concentration(results: EntropyInfluenceResults, evaluation: int = 0) -> Figure:
    """Draw the share of influence in the strongest tokens: of |delta|, and of positive and of negative delta.

    Raises:
        ValueError: where every influence is 0.
    """
    influence = Tokens(results, evaluation).influence
    if not influence.any():
        raise ValueError("per_token is 0 throughout; expected some influence, to take shares of. Omit this figure")
    curves, n = curves_of(influence), len(influence)
    # More points than these are not distinguishable on a logarithmic axis.
    index = np.unique(np.concatenate([np.geomspace(1, n, 2000).astype(int), [n]])) - 1
    share = (index + 1) / n
    drawing = figure(5.6, 4.0)
    axes = drawing.subplots()
    for name, values, colour, line in (
        ("of the sum of |influence|", curves.absolute, BLACK, "-"),
        ("of all that raise", curves.raising, RAISES, "--"),
        ("of all that lower", curves.lowering, LOWERS, "-."),
    ):
        axes.plot(100 * share, 100 * values[index], line, color=colour, label=name, drawstyle="steps-post")
    axes.plot(100 * share, 100 * share, ":", color=GREY, linewidth=1, label="if all were equal")
    marked = np.array([int(np.ceil(f * n)) for f in FRACTIONS])
    axes.plot(100 * marked / n, 100 * curves.absolute[marked - 1], "o", color=BLACK, markersize=4)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlim(100 / n, 100)
    axes.set_ylim(0, 104)
    axes.set_xlabel(f"strongest tokens by |influence| (% of {n})")
    axes.set_ylabel("share of the influence (%)")
    strongest = curves.absolute[marked[FRACTIONS.index(0.02)] - 1]
    axes.set_title(f"The strongest 2% of the tokens hold {strongest:.0%} of the influence")
    axes.legend(fontsize=8, loc="best")
    return drawing


class _PlacedToken(NamedTuple):
    """A token at its line and column; ``in_mask``: whether it is in the completion mask."""

    text: str
    value: float
    in_mask: bool
    line: int
    column: int


@styled
def tokens(results: EntropyInfluenceResults, i: int, evaluation: int = 0) -> Figure:
    """Draw the completion of rollout ``i`` of U, each token shaded by its influence; grey text is not in the mask.

    Characters that are not printable are escaped. Colours end at the rollout's largest |influence|; of a longer
    completion the first 1,500 tokens are drawn.

    Args:
        results: a finished run.
        i: index of the rollout in U.
        evaluation: index of the evaluation batch.

    Raises:
        IndexError: for a rollout that U does not have.
    """
    record = results.sequences[i]
    start, texts = record["prompt_length"], record["tokens"]
    values = results.evaluations[evaluation].arrays["per_token"][i, start : start + len(texts)]
    mask = completion_mask(results)[i, start : start + len(texts)]
    placed = list(_layout(texts[:MAX_TOKENS], values, mask))
    lines = placed[-1].line + 1 if placed else 1
    head = _head(results, i, evaluation)
    if len(texts) > MAX_TOKENS:
        head += f"\nThe first {MAX_TOKENS} of {len(texts)} tokens."
    head_height = 0.18 * (head.count("\n") + 1) + 0.15
    width, height = LINE_WIDTH * 0.602 * FONT_SIZE / 72 + 0.3, lines * 1.6 * FONT_SIZE / 72
    drawing = Figure(figsize=(width, head_height + height + 0.75))
    largest = float(np.abs(values).max()) if len(values) and values.any() else 1.0
    scale = ScalarMappable(Normalize(-largest, largest), DIVERGING)
    literal(
        drawing.text(0.15 / width, 1 - 0.1 / drawing.get_figheight(), head, va="top", fontsize=8.5, linespacing=1.4)
    )
    total = drawing.get_figheight()
    axes = drawing.add_axes((0.15 / width, 0.75 / total, 1 - 0.3 / width, height / total))
    _draw(axes, placed, scale, lines)
    bar = drawing.colorbar(
        scale, cax=drawing.add_axes((0.15 / width, 0.42 / total, 0.45, 0.13 / total)), orientation="horizontal"
    )
    bar.set_label(
        f"influence of a token ({UNIT}); blue raises the entropy, vermilion lowers it", fontsize=8, loc="left"
    )
    bar.ax.tick_params(labelsize=7.5)
    return drawing


def _head(results: EntropyInfluenceResults, i: int, evaluation: int) -> str:
    record, arrays = results.sequences[i], results.evaluations[evaluation].arrays
    error = float(arrays["stderr"][i])
    facts = [f"rollout {i} ({drawable(record['id'])})"]
    facts += [f"{name} {record[name]:+.3g}" for name in ("reward", "advantage") if record[name] is not None]
    facts.append(
        f"influence {arrays['per_sequence'][i]:+.3g}" + ("" if np.isnan(error) else f" ± {error:.2g}") + f" {UNIT}"
    )
    prompt = textwrap.wrap("prompt: " + drawable(displayed_prompt(record)), LINE_WIDTH, max_lines=3, placeholder=" …")
    return "\n".join([", ".join(facts), *prompt])


def _layout(texts: list[str], values: np.ndarray, mask: np.ndarray) -> Iterator[_PlacedToken]:
    """Yield the tokens in lines of ``LINE_WIDTH`` characters; a newline ends a line."""
    line = column = 0
    for raw, value, in_mask in zip(texts, values, mask, strict=False):
        text = drawable(raw, MONO)
        text = text if len(text) <= LINE_WIDTH else text[: LINE_WIDTH - 1] + "…"
        if column + len(text) > LINE_WIDTH:
            line, column = line + 1, 0
        yield _PlacedToken(text, float(value), bool(in_mask), line, column)
        column += len(text)
        if raw.endswith("\n"):
            line, column = line + 1, 0


def _draw(axes: Axes, placed: list[_PlacedToken], scale: ScalarMappable, lines: int) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, LINE_WIDTH)
    axes.set_ylim(lines, 0)
    for token in placed:
        red, green, blue, _ = scale.to_rgba(np.array(token.value))
        dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
        if token.in_mask:
            box = Rectangle((token.column, token.line + 0.08), len(token.text), 0.84, facecolor=(red, green, blue))
            box.set(edgecolor="#C8C8C8", linewidth=0.4)
            axes.add_patch(box)
        colour = "white" if dark and token.in_mask else BLACK if token.in_mask else GREY
        font: dict[str, Any] = {"va": "center_baseline", "family": MONO, "fontsize": FONT_SIZE}
        literal(axes.text(token.column, token.line + 0.5, token.text, color=colour, **font))
