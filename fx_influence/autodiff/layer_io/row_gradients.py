"""Gradients of a batch's rows, as products of the layer inputs and the output gradients of one plain reverse pass."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from einops import reduce
from torch import Tensor

from fx_influence.core.tree import promote

Kind = Literal["linear", "transposed", "embedding", "scale", "shift"]


class LayerIO(NamedTuple):
    """Input and output gradient of one use of a parameter w in the forward of B rows with S positions each.

    ``kind``: how w is used. ``linear``: y = x w^T, ``inputs`` x (B, S, in). ``transposed``: y = x w. ``embedding``:
    ``inputs`` ids (B, S). ``scale``: y = w x elementwise, ``inputs`` x (B, S, out). ``shift``: y = x + w, no inputs.
    ``grads``: (B, S, out), the gradient of the output y.
    """

    kind: Kind
    inputs: Tensor | None
    grads: Tensor


LayerIOs = dict[str, list[LayerIO]]
"""Layer IO of a batch's rows by parameter, one per use; a row's gradient is the sum over the uses."""


def row_gradients(
    layer_ios: LayerIOs, name: str, like: Tensor, entries: slice, rows: int, out: Tensor | None = None
) -> Tensor:
    """Return every row's gradient of some entries of a parameter.

    Args:
        layer_ios: layer IO of the rows, by parameter.
        name: the parameter.
        like: the parameter's value, for shape, dtype and device.
        entries: the entries ``like[entries]`` of its first axis.
        rows: number of rows.
        out: tensor (rows, ...) of the result's dtype to write into, or None.

    Returns:
        (rows, ...), at least float32; zeros where the parameter has no use.
    """
    if out is None:
        out = like.new_empty(rows, *like[entries].shape, dtype=promote(like.dtype))
    uses = layer_ios.get(name, [])
    if not uses:
        return out.zero_()
    for k, use in enumerate(uses):
        write_row_gradients(use, entries, out, add=k > 0)
    return out


def write_row_gradients(use: LayerIO, entries: slice, out: Tensor, add: bool) -> None:
    """Write, or ``add``, the rows' gradients through one use to ``out``.

    Args:
        use: layer IO of one use of the parameter.
        entries: entries of the parameter's first axis.
        out: (rows, entries, ...), changed in place.
        add: whether to add to ``out`` instead of overwriting it.
    """
    kind, x, g = use
    if x is not None and kind in ("linear", "transposed"):
        # einsum(g, x, "row pos out, row pos in -> row out in"), written straight into ``out``, because for all rows
        # of a large weight a copy costs as much as the product.
        left, right = (g[..., entries], x) if kind == "linear" else (x[..., entries], g)
        pair = left.transpose(1, 2).to(out.dtype), right.to(out.dtype)
        out.baddbmm_(*pair) if add else torch.bmm(*pair, out=out)
        return
    grads = _elementwise_gradients(use, entries, out.dtype)
    out.add_(grads) if add else out.copy_(grads)


def sum_of_row_gradients(use: LayerIO, rows: Tensor, like: Tensor) -> Tensor:
    """Return the sum of some rows' gradients through one use, at least float32.

    Args:
        use: layer IO of one use of the parameter.
        rows: int64, the rows.
        like: the parameter's value, for its shape.
    """
    kind, x, g = use
    g = g[rows].flatten(0, 1)
    g = g.to(promote(g.dtype))
    if x is None:
        return g.sum(0)
    x = x[rows].flatten(0, 1)
    if kind == "embedding":
        return g.new_zeros(like.shape).index_add_(0, x, g)
    x = x.to(g.dtype)
    if kind == "scale":
        return (g * x).sum(0)
    return g.T @ x if kind == "linear" else x.T @ g


def _elementwise_gradients(use: LayerIO, entries: slice, dtype: torch.dtype) -> Tensor:
    """Return the rows' gradients through a shift, a scale or an embedding, (rows, entries, ...)."""
    kind, x, g = use
    if x is None:
        return reduce(g[..., entries].to(dtype), "row pos out -> row out", "sum")
    if kind == "scale":
        return reduce(g[..., entries].to(dtype) * x[..., entries], "row pos out -> row out", "sum")
    inside = ((x >= entries.start) & (x < entries.stop)).unsqueeze(-1)
    count = entries.stop - entries.start
    index = (x - entries.start).clamp(0, count - 1).unsqueeze(-1).expand_as(g)
    out = g.new_zeros(len(g), count, g.shape[-1], dtype=dtype)
    return out.scatter_add_(1, index, torch.where(inside, g, 0.0).to(dtype))
