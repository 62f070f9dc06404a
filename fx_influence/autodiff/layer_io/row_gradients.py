"""Gradients of the rows of a batch, as products of layer inputs and output gradients."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fx_influence.core.tree import promote

MAX_GRADIENT_ENTRIES = 2**24
"""Entries of rows' gradients that ``inner_products`` forms at once: 64 MiB of float32."""


BLOCK_COLUMNS = 1024
"""Columns that a product of two blocks of gradients sums up at once."""


Kind = Literal["linear", "transposed", "embedding", "scale", "shift"]


class LayerIO(NamedTuple):
    """One use of a parameter w in the forward of B rows; S positions each, ``grads`` (B, S, out) of what leaves it.

    ``linear``: y = x w^T, ``inputs`` x (B, S, in). ``transposed``: y = x w. ``embedding``: ``inputs`` ids (B, S).
    ``scale``: y = w x elementwise, ``inputs`` x (B, S, out). ``shift``: y = x + w, no inputs.
    """

    kind: Kind
    inputs: Tensor | None
    grads: Tensor


LayerIOs = dict[str, list[LayerIO]]
"""Factors of a batch's rows by parameter; a row's gradient is the sum over the uses."""


def row_gradients(
    factors: LayerIOs, name: str, like: Tensor, part: slice, rows: int, out: Tensor | None = None
) -> Tensor:
    """Every row's gradient of the entries ``like[part]`` of a parameter, (rows, ...), at least float32.

    ``out``: where to write it, of that shape and dtype.
    """
    if out is None:
        out = like.new_empty(rows, *like[part].shape, dtype=promote(like.dtype))
    uses = factors.get(name, [])
    if not uses:
        return out.zero_()
    for k, factor in enumerate(uses):
        write_row_gradients(factor, part, out, add=k > 0)
    return out


def write_row_gradients(factor: LayerIO, part: slice, out: Tensor, add: bool) -> None:
    kind, x, g = factor
    if x is not None and kind in ("linear", "transposed"):
        left, right = (g[..., part], x) if kind == "linear" else (x[..., part], g)
        pair = left.transpose(1, 2).to(out.dtype), right.to(out.dtype)
        # Into its place at once: for all rows and a large weight a copy costs as much as the product.
        out.baddbmm_(*pair) if add else torch.bmm(*pair, out=out)
        return
    found = _elementwise(factor, part, out.dtype)
    out.add_(found) if add else out.copy_(found)


def _elementwise(factor: LayerIO, part: slice, dtype: torch.dtype) -> Tensor:
    kind, x, g = factor
    if x is None:
        return g[..., part].to(dtype).sum(1)
    if kind == "scale":
        return (g[..., part].to(dtype) * x[..., part]).sum(1)
    inside = ((x >= part.start) & (x < part.stop)).unsqueeze(-1)
    at = (x - part.start).clamp(0, part.stop - part.start - 1).unsqueeze(-1).expand_as(g)
    out = g.new_zeros(len(g), part.stop - part.start, g.shape[-1], dtype=dtype)
    return out.scatter_add_(1, at, torch.where(inside, g, 0.0).to(dtype))
