"""Display of an Influence: one line of text, and a small HTML table in notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

STRONGEST = 5


UNIT = "per unit lr"


ILL_CONDITIONED = 0.5
"""``conditioning`` above which the parts of single rollouts are not to be read."""


CONDITIONING_REMEDY = (
    "Read the total and sums over many rollouts, not single rollouts or tokens; or measure a later step, once AdamW's "
    "second moment comes from several steps. preconditioner='rmsprop' has the same denominator"
)
"""What to do where ``conditioning`` is above ``ILL_CONDITIONED``."""


def influence_line(out: Any) -> str:
    """The totals of an ``Influence`` in a line; the plain fields where they are no numbers, as under ``torch.vmap``."""
    try:
        figures = {name: f"{value:+.4g}" + _plus_minus(error) for name, value, error in _totals(out)}
    except (RuntimeError, TypeError, ValueError):
        return f"{type(out).__name__}({', '.join(f'{name}={value!r}' for name, value in out._asdict().items())})"
    sizes = {"rollouts": len(out.per_sequence), "residual": f"{float(out.residual):.1e}"}
    if _ill_conditioned(out):
        sizes["conditioning"] = f"{float(out.conditioning):.2f}"
    if not out.rounding.isnan().all():
        sizes["rounding"] = f"{float(out.rounding.nansum()):.1e}"
    sizes["per_token"] = None if out.per_token is None else tuple(out.per_token.shape)
    sizes["matrix"] = None if out.matrix is None else tuple(out.matrix.shape)
    inside = ", ".join(f"{name}={value}" for name, value in {**figures, **sizes}.items())
    return f"{type(out).__name__}({inside}; {UNIT})"


def influence_html(out: Any) -> str:
    """The totals of an ``Influence`` and the rollouts that raise and lower most, as an HTML table."""
    rows = [(name.replace("_", " "), f"{value:+.4g}", _plus_minus(error)) for name, value, error in _totals(out)]
    order = out.per_sequence.argsort(descending=True).tolist()
    half = min(STRONGEST, len(order) // 2)
    chosen = order if len(order) <= 2 * STRONGEST else order[:half] + order[-half:]
    error = out.stderr.tolist()
    rows += [(f"rollout {i}", f"{out.per_sequence[i].item():+.4g}", _plus_minus(error[i])) for i in chosen]
    rows.append(("residual", f"{float(out.residual):.1e}", ""))
    if _ill_conditioned(out):
        rows.append(("conditioning: read no single rollout", f"{float(out.conditioning):.2f}", ""))
    if not out.rounding.isnan().all():
        rows.append(("rounding, summed", f"{float(out.rounding.nansum()):.1e}", ""))
    head = ("part", UNIT, "stderr")
    return f"<table><thead>{_row(head, 'th')}</thead><tbody>{''.join(_row(row, 'td') for row in rows)}</tbody></table>"


def _ill_conditioned(out: Any) -> bool:
    """Return whether the parts of single rollouts are not to be read; not where ``conditioning`` was not measured."""
    return float(out.conditioning) > ILL_CONDITIONED


def _totals(out: Any) -> Iterable[tuple[str, float, float]]:
    nan = float("nan")
    totals = [
        ("total", float(out.total), float(out.total_stderr)),
        ("momentum", float(out.momentum), nan),
        ("weight_decay", float(out.weight_decay), nan),
        ("sum_per_sequence", float(out.per_sequence.sum()), nan),
    ]
    unattributed = float(out.unattributed)
    return [*totals, ("unattributed", unattributed, nan)] if unattributed else totals


def _plus_minus(error: float) -> str:
    return "" if error != error else f" ± {error:.2g}"


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
