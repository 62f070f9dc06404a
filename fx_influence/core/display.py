"""How a result shows itself: one line of text, and a small HTML table in notebooks."""

from __future__ import annotations

import dataclasses
import html
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
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


def record_line(record: Any, defaults: Mapping[str, Any] | None = None) -> str:
    """Return a named tuple or dataclass in a line: shapes for tensors, counts for what is long.

    ``defaults``: values by field that are left out of the line where the record has them.

    Example:
        >>> from fx_influence.types import TokenValues
        >>> import torch
        >>> record_line(TokenValues(torch.zeros(2, 3), torch.tensor(0.5)))
        'TokenValues(logprobs=float32 (2, 3), entropies=0.5)'
    """
    names = record._fields if hasattr(record, "_fields") else [field.name for field in dataclasses.fields(record)]
    values = {name: getattr(record, name) for name in names}
    if defaults:
        values = {name: x for name, x in values.items() if name not in defaults or x != defaults[name]}
    return f"{type(record).__name__}({', '.join(f'{name}={brief(x)}' for name, x in values.items())})"


def brief(value: Any) -> str:
    """Return a value in a few words: numbers as they are, texts abridged, of all else what it is and how much.

    Example:
        >>> brief({"w": 1.0}), brief(list(range(9))), brief("x" * 99)[:7]
        ("{'w': 1.0}", '9 of int', "'xxxxxx")
    """
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, (str, PathLike)):
        return _abridged.repr(str(value))
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _array(value)
    if hasattr(value, "_fields") or dataclasses.is_dataclass(value):
        return repr(value)
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, (list, tuple)):
        return _sequence(value)
    return type(value).__name__


_abridged = reprlib.Repr()
_abridged.maxstring = 60
FEW = 3


def _array(value: Any) -> str:
    shape = tuple(value.shape)
    if not shape:
        try:
            return f"{value.item():.6g}"
        # A scalar of which there are many, under torch.vmap.
        except (RuntimeError, ValueError):
            pass
    return f"{str(value.dtype).removeprefix('torch.')} {shape}"


def _mapping(value: Mapping[Any, Any]) -> str:
    arrays = [x for x in value.values() if hasattr(x, "shape")]
    if arrays and len(arrays) == len(value):
        return f"{len(value)} tensors of {sum(_count(x) for x in arrays):,} numbers"
    if len(value) <= FEW and all(isinstance(x, (int, float, str, type(None))) for x in value.values()):
        return f"{{{', '.join(f'{brief(name)}: {brief(x)}' for name, x in value.items())}}}"
    return f"{len(value)} by name"


def _sequence(value: Sequence[Any]) -> str:
    if len(value) <= FEW and all(isinstance(x, (int, float, str)) for x in value):
        return f"[{', '.join(map(brief, value))}]"
    if len(value) == 1 and (hasattr(value[0], "_fields") or dataclasses.is_dataclass(value[0])):
        return f"[{value[0]!r}]"
    kinds = {type(x).__name__ for x in value}
    return f"{len(value)} of {' or '.join(sorted(kinds))}" if value else "[]"


def _count(x: Any) -> int:
    size = 1
    for n in x.shape:
        size *= int(n)
    return size
