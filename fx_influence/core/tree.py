"""Arithmetic on parameter dictionaries: the few operations that directions and gradients need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fx_influence.core.dtensor import reduce_over_shards, to_local
from fx_influence.types import Gradients, Params


def promote(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else at least float32."""
    return torch.promote_types(dtype, torch.float32)


def detached(params: Params) -> Params:
    """The same values without their autograd history, so that a user's ``requires_grad`` follows no result."""
    return {name: p.detach() for name, p in params.items()}


def dot(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor]) -> Tensor:
    """Inner product sum_name <a_name, b_name> accumulated in float64; names absent or None in ``a`` count as 0.

    Returns a float64 scalar on the device of ``b``, of DTensors the same on every rank.

    Example:
        >>> dot({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 2.0]), "v": torch.ones(1)}).item()
        3.0
    """
    return torch.stack(list(dot_by_name(a, b).values())).sum()


def dot_by_name(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """<a_name, b_name> for every name of ``b``, as in ``dot``; of DTensors, one all-reduce for all names."""
    out = {name: to_local(y).new_zeros((), dtype=torch.float64) for name, y in b.items()}
    found = {name: _dot(to_local(x).flatten(), to_local(b[name]).flatten()) for name, x in a.items() if x is not None}
    return out | dict(zip(found, reduce_over_shards(list(found.values()), [b[name] for name in found]), strict=True))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    # In blocks that the cache of a CPU holds in float64; for a GPU the fewer the better.
    size = 2**16 if a.device.type == "cpu" else 2**26
    blocks = zip(a.split(size), b.split(size), strict=True)
    return torch.stack([torch.dot(x.double(), y.double()) for x, y in blocks]).sum()


def add(a: Params, b: Mapping[str, Tensor | None]) -> Params:
    """a + b by name, a's names; absent or None in ``b`` counts as 0."""
    out = {}
    for name, x in a.items():
        y = b.get(name)
        out[name] = x if y is None else x + y
    return out


def multiply(a: Params, b: Mapping[str, Tensor | None]) -> Params:
    """Elementwise product by name, a's names; absent or None in ``b`` counts as 0."""
    out = {}
    for name, x in a.items():
        y = b.get(name)
        out[name] = torch.zeros_like(x) if y is None else x * y
    return out


def accumulate(total: Gradients, more: Iterable[tuple[str, Tensor | None]]) -> None:
    """Add gradients to those of ``total``, at least float32, in place; None adds nothing.

    Autograd may give one tensor for two names, or one value for many entries: those are copied first.
    """
    held = {_address(x) for x in total.values() if x is not None}
    for name, g in more:
        if g is not None:
            g, old = g.to(promote(g.dtype)), total[name]
            if old is not None:
                old.add_(g)
                continue
            total[name] = g.clone() if _address(g) in held or not g.is_contiguous() else g
            held.add(_address(g))


def _address(x: Tensor) -> int:
    return to_local(x).data_ptr()


def largest_entry(direction: Params) -> float:
    """max |v| over all entries, or 1.0 where that is 0: what to divide v by before it is cast to a narrower dtype."""
    found = [_largest(to_local(v)) for v in direction.values()]
    largest = max(map(float, reduce_over_shards(found, list(direction.values()), largest=True)), default=0.0)
    return largest if largest > 0 else 1.0


def _largest(x: Tensor) -> Tensor:
    return torch.stack(x.aminmax()).abs().max().double() if x.numel() else x.new_zeros((), dtype=torch.float64)


def unit_direction(direction: Params, params: Params) -> tuple[float, Params]:
    """The largest entry and the direction over it in the parameters' dtypes, names absent as 0.

    Scaled before the cast, a huge or tiny direction neither overflows nor vanishes in a narrower dtype.
    """
    scale = largest_entry(direction)
    unit = {
        name: (direction[name] / scale).to(p.dtype) if name in direction else torch.zeros_like(p)
        for name, p in params.items()
    }
    return scale, unit


def shift(params: Params, direction: Params, eta: float | Tensor) -> Params:
    """theta + eta v in the dtype of theta; names absent in ``direction`` stay where they are."""
    return {name: p + (eta * direction[name]).to(p.dtype) if name in direction else p for name, p in params.items()}
