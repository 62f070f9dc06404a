"""Display of an Influence: one line of text, and a small HTML table in notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

MAX_ROLLOUTS_PER_SIGN = 5
"""Rollouts of each sign in the HTML table."""

UNIT = "per unit lr"

ILL_CONDITIONED = 0.5
"""Value of ``conditioning`` above which the influences of single rollouts mean nothing."""

CONDITIONING_REMEDY = (
    "Read the total and sums over many rollouts, not single rollouts or tokens; or measure a later step, once AdamW's "
    "second moment comes from several steps. preconditioner='rmsprop' has the same denominator"
)
"""Remedy for a ``conditioning`` above ``ILL_CONDITIONED``."""


def influence_line(out: Any) -> str:
    """Return the totals of an ``Influence`` in a line, or its plain fields under ``torch.vmap``."""
    try:
        figures = {name: f"{value:+.4g}" + _plus_minus(error) for name, value, error in _totals(out)}
    except (RuntimeError, TypeError, ValueError):
        return f"{type(out).__name__}({', '.join(f'{name}={value!r}' for name, value in out._asdict().items())})"
    sizes = {"rollouts": len(out.per_sequence), "residual": f"{float(out.residual):.1e}"}
    if float(out.score_share) != 1:
        sizes["score_share"] = f"{float(out.score_share):.3g} (biased)"
    if _ill_conditioned(out):
        sizes["conditioning"] = f"{float(out.conditioning):.2f}"
    if not out.rounding.isnan().all():
        sizes["rounding"] = f"{float(out.rounding.nansum()):.1e}"
    sizes["per_token"] = None if out.per_token is None else tuple(out.per_token.shape)
    sizes["matrix"] = None if out.matrix is None else tuple(out.matrix.shape)
    fields = ", ".join(f"{name}={value}" for name, value in {**figures, **sizes}.items())
    return f"{type(out).__name__}({fields}; {UNIT})"


def influence_html(out: Any) -> str:
    """Return an HTML table of the totals of an ``Influence`` and of the rollouts that raise and lower entropy most."""
    rows = [(name.replace("_", " "), f"{value:+.4g}", _plus_minus(error)) for name, value, error in _totals(out)]
    order = out.per_sequence.argsort(descending=True).tolist()
    half = min(MAX_ROLLOUTS_PER_SIGN, len(order) // 2)
    chosen = order if len(order) <= 2 * MAX_ROLLOUTS_PER_SIGN else order[:half] + order[-half:]
    error = out.stderr.tolist()
    rows += [(f"rollout {i}", f"{out.per_sequence[i].item():+.4g}", _plus_minus(error[i])) for i in chosen]
    rows.append(("residual", f"{float(out.residual):.1e}", ""))
    if float(out.score_share) != 1:
        rows.append(("share of the score term: biased", f"{float(out.score_share):.3g}", ""))
    if _ill_conditioned(out):
        rows.append(("conditioning: read no single rollout", f"{float(out.conditioning):.2f}", ""))
    if not out.rounding.isnan().all():
        rows.append(("rounding, summed", f"{float(out.rounding.nansum()):.1e}", ""))
    head = ("part", UNIT, "stderr")
    return f"<table><thead>{_row(head, 'th')}</thead><tbody>{''.join(_row(row, 'td') for row in rows)}</tbody></table>"


def _ill_conditioned(out: Any) -> bool:
    """Return whether single rollouts mean nothing; False where ``conditioning`` was not measured and is NaN."""
    return float(out.conditioning) > ILL_CONDITIONED


def _totals(out: Any) -> Iterable[tuple[str, float, float]]:
    """Return (name, value, standard error) of each total; the error is NaN where there is none."""
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
