"""The tokens: how concentrated their influence is, and a completion with each of them shaded."""

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

WIDTH = 92
"""Characters in a line."""
MOST_TOKENS = 1500
SIZE = 9.0
"""Points."""


@styled
def concentration(results: EntropyInfluenceResults, evaluation: int = 0) -> Figure:
    """Share of the influence in the strongest tokens: of all |delta|, and of what raises and lowers apart.

    Raises ``ValueError`` where every influence is 0.
    """
    influence = Tokens(results, evaluation).influence
    if not influence.any():
        raise ValueError("every token's influence is 0, so that there is nothing to share out")
    curves, n = curves_of(influence), len(influence)
    # As many points as can be told apart on an axis of decades.
    kept = np.unique(np.concatenate([np.geomspace(1, n, 2000).astype(int), [n]])) - 1
    share = (kept + 1) / n
    made = figure(5.6, 4.0)
    axes = made.subplots()
    for name, values, colour, line in (
        ("of the sum of |influence|", curves.absolute, BLACK, "-"),
        ("of all that raises", curves.raising, RAISES, "--"),
        ("of all that lowers", curves.lowering, LOWERS, "-."),
    ):
        axes.plot(100 * share, 100 * values[kept], line, color=colour, label=name, drawstyle="steps-post")
    axes.plot(100 * share, 100 * share, ":", color=GREY, linewidth=1, label="if all were equal")
    at = np.array([int(np.ceil(f * n)) for f in FRACTIONS])
    axes.plot(100 * at / n, 100 * curves.absolute[at - 1], "o", color=BLACK, markersize=4)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlim(100 / n, 100)
    axes.set_ylim(0, 104)
    axes.set_xlabel(f"strongest tokens by |influence| (% of {n})")
    axes.set_ylabel("share of the influence (%)")
    strongest = curves.absolute[at[FRACTIONS.index(0.02)] - 1]
    axes.set_title(f"The strongest 2% of the tokens hold {strongest:.0%} of the influence")
    axes.legend(fontsize=8, loc="best")
    return made


class _Placed(NamedTuple):
    text: str
    value: float
    counts: bool
    line: int
    column: int


@styled
def tokens(results: EntropyInfluenceResults, i: int, evaluation: int = 0) -> Figure:
    """The completion of rollout ``i`` of U, each token shaded by its influence; grey text does not count.

    What is no printable character is escaped. Colours end at the rollout's largest |influence|; of a longer completion
    the first 1,500 tokens are shown. Raises ``IndexError`` for a rollout that U does not have.
    """
    record = results.sequences[i]
    start, texts = record["prompt_length"], record["tokens"]
    values = results.evaluations[evaluation].arrays["per_token"][i, start : start + len(texts)]
    counts = completion_mask(results)[i, start : start + len(texts)]
    placed = list(_placed(texts[:MOST_TOKENS], values, counts))
    lines = placed[-1].line + 1 if placed else 1
    head = _head(results, i, evaluation)
    if len(texts) > MOST_TOKENS:
        head += f"\nThe first {MOST_TOKENS} of {len(texts)} tokens."
    above = 0.18 * (head.count("\n") + 1) + 0.15
    width, height = WIDTH * 0.602 * SIZE / 72 + 0.3, lines * 1.6 * SIZE / 72
    made = Figure(figsize=(width, above + height + 0.75))
    largest = float(np.abs(values).max()) if len(values) and values.any() else 1.0
    scale = ScalarMappable(Normalize(-largest, largest), DIVERGING)
    literal(made.text(0.15 / width, 1 - 0.1 / made.get_figheight(), head, va="top", fontsize=8.5, linespacing=1.4))
    total = made.get_figheight()
    axes = made.add_axes((0.15 / width, 0.75 / total, 1 - 0.3 / width, height / total))
    _draw(axes, placed, scale, lines)
    bar = made.colorbar(
        scale, cax=made.add_axes((0.15 / width, 0.42 / total, 0.45, 0.13 / total)), orientation="horizontal"
    )
    bar.set_label(
        f"influence of a token ({UNIT}); blue raises the entropy, vermilion lowers it", fontsize=8, loc="left"
    )
    bar.ax.tick_params(labelsize=7.5)
    return made


def _head(results: EntropyInfluenceResults, i: int, evaluation: int) -> str:
    record, arrays = results.sequences[i], results.evaluations[evaluation].arrays
    error = float(arrays["stderr"][i])
    stated = [f"rollout {i} ({drawable(record['id'])})"]
    stated += [f"{name} {record[name]:+.3g}" for name in ("reward", "advantage") if record[name] is not None]
    stated.append(
        f"influence {arrays['per_sequence'][i]:+.3g}" + ("" if np.isnan(error) else f" ± {error:.2g}") + f" {UNIT}"
    )
    prompt = textwrap.wrap("prompt: " + drawable(displayed_prompt(record)), WIDTH, max_lines=3, placeholder=" …")
    return "\n".join([", ".join(stated), *prompt])


def _placed(texts: list[str], values: np.ndarray, counts: np.ndarray) -> Iterator[_Placed]:
    line = column = 0
    for raw, value, counted in zip(texts, values, counts, strict=False):
        text = drawable(raw, MONO)
        text = text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
        if column + len(text) > WIDTH:
            line, column = line + 1, 0
        yield _Placed(text, float(value), bool(counted), line, column)
        column += len(text)
        if raw.endswith("\n"):
            line, column = line + 1, 0


def _draw(axes: Axes, placed: list[_Placed], scale: ScalarMappable, lines: int) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(lines, 0)
    for token in placed:
        red, green, blue, _ = scale.to_rgba(np.array(token.value))
        dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
        if token.counts:
            box = Rectangle((token.column, token.line + 0.08), len(token.text), 0.84, facecolor=(red, green, blue))
            box.set(edgecolor="#C8C8C8", linewidth=0.4)
            axes.add_patch(box)
        colour = "white" if dark and token.counts else BLACK if token.counts else GREY
        where: dict[str, Any] = {"va": "center_baseline", "family": MONO, "fontsize": SIZE}
        literal(axes.text(token.column, token.line + 0.5, token.text, color=colour, **where))
