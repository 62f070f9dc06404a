"""Arithmetic on parameter dictionaries: the few operations that directions and gradients need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.core.dtensor import reduce_over_shards, to_local, to_numbers
from fx_influence.types import Gradients, Params


def promote(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to accumulate in: float64 for float64, else at least float32."""
    return torch.promote_types(dtype, torch.float32)


def detached(params: Params) -> Params:
    """Return the same values without their autograd history, so that no result follows a user's ``requires_grad``."""
    return {name: p.detach() for name, p in params.items()}


def dot(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product sum_name <a_name, b_name>, accumulated in float64.

    Names that are absent or None in ``a`` count as 0. The result is a float64 scalar on the device of ``b``; of
    DTensors it is the same on every rank.

    Example:
        >>> dot({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 2.0]), "v": torch.ones(1)}).item()
        3.0
    """
    return torch.stack(list(dot_by_name(a, b).values())).sum()


def dot_by_name(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return <a_name, b_name> for every name of ``b``, as in ``dot``; DTensors take one all-reduce for all names."""
    zeros = {name: to_local(y).new_zeros((), dtype=torch.float64) for name, y in b.items()}
    local = {name: _dot(to_local(x).flatten(), to_local(b[name]).flatten()) for name, x in a.items() if x is not None}
    return zeros | dict(zip(local, reduce_over_shards(list(local.values()), [b[name] for name in local]), strict=True))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the float64 inner product of two vectors on the device of b, whose blocks are moved to that of a."""
    # A block of 2**16 entries fits a CPU's cache in float64; a GPU is fastest with the fewest blocks.
    size = 2**16 if a.device.type == "cpu" else 2**26
    blocks = zip(a.split(size), b.split(size), strict=True)
    return torch.stack([torch.dot(x.double(), y.to(x.device).double()) for x, y in blocks]).sum().to(b.device)


def add(a: Params, b: Mapping[str, Tensor | None]) -> Params:
    """Return a + b for every name of ``a``; names that are absent or None in ``b`` count as 0."""
    out = {}
    for name, x in a.items():
        y = b.get(name)
        out[name] = x if y is None else x + y
    return out


def multiply(a: Params, b: Mapping[str, Tensor | None]) -> Params:
    """Return the elementwise product for every name of ``a``; names that are absent or None in ``b`` count as 0."""
    out = {}
    for name, x in a.items():
        y = b.get(name)
        out[name] = torch.zeros_like(x) if y is None else x * y
    return out


def accumulate(
    total: Gradients,
    more: Iterable[tuple[str, Tensor | None]],
    dtype: torch.dtype | None = None,
    addresses: set[int] | None = None,
) -> None:
    """Add gradients to those of ``total`` in place; None adds nothing.

    Autograd may return one tensor under two names, or an expanded tensor whose entries share memory. Both are copied
    before anything is added to them.

    Args:
        total: gradients by name.
        more: (name, gradient) pairs to add.
        dtype: of the sums; None takes at least float32.
        addresses: ``addresses_of(total)``, kept up to date here, for a caller that adds many times; None makes it.
    """
    addresses = addresses_of(total) if addresses is None else addresses
    for name, g in more:
        if g is not None:
            g, old = g.to(dtype or promote(g.dtype)), total[name]
            if old is not None:
                old.add_(g)
                continue
            total[name] = g.clone() if _address(g) in addresses or not g.is_contiguous() else g
            addresses.add(_address(g))


def addresses_of(total: Gradients) -> set[int]:
    """Return the memory addresses of the entries of ``total``."""
    return {_address(x) for x in total.values() if x is not None}


def _address(x: Tensor) -> int:
    """Return the memory address of a tensor's first local entry."""
    return to_local(x).data_ptr()


def largest_entry(direction: Params) -> float:
    """Return max |v| over all entries, or 1.0 where that is 0: the divisor before a cast to a narrower dtype."""
    local = [_max_abs(to_local(v)) for v in direction.values()]
    largest = max(to_numbers(reduce_over_shards(local, list(direction.values()), largest=True)), default=0.0)
    return largest if largest > 0 else 1.0


def _max_abs(x: Tensor) -> Tensor:
    """Return max |x| as a float64 scalar, 0 for a tensor without entries."""
    return torch.stack(x.aminmax()).abs().max().double() if x.numel() else x.new_zeros((), dtype=torch.float64)


def unit_direction(direction: Params, params: Params) -> tuple[float, Params]:
    """Return the largest entry of ``direction``, and ``direction`` divided by it in the dtypes of ``params`` at most.

    Names that are absent in ``params`` are left out. Scaled before the cast, a huge or tiny direction neither overflows
    nor vanishes in a narrower dtype. The unit of a ``Direction`` is not copied, and where it is narrower than the
    parameters, or on another device, it stays so: each pass casts it where it is used, see ``cast_like``.
    """
    scale = largest_entry(direction)
    unit = {}
    for name, p in params.items():
        v = direction.get(name)
        if v is not None:
            v = v if scale == 1.0 else v / scale
            unit[name] = v.to(p.dtype) if v.element_size() > p.element_size() else v
    return scale, unit


def cast_floating(tree: Params, dtype: torch.dtype | None) -> Params:
    """Return floating-point tensors by name in ``dtype``, others and all under None as they are."""
    return {name: x.to(dtype) if dtype is not None and x.is_floating_point() else x for name, x in tree.items()}


def cast_like(v: Tensor, p: Tensor) -> Tensor:
    """Return v in the dtype and on the device of p; v itself if it is there already."""
    return v.to(device=p.device, dtype=p.dtype)


def full_tangent(direction: Params, params: Params) -> Params:
    """Return a tangent for every parameter in its dtype and on its device, 0 where ``direction`` has none."""
    return {
        name: cast_like(direction[name], p) if name in direction else torch.zeros_like(p) for name, p in params.items()
    }


class Direction(NamedTuple):
    """A direction in parameter space as scale * unit, with the largest entry of ``unit`` 1 (or all of them 0)."""

    scale: float
    unit: Params

    @classmethod
    def of_(cls, v: Params) -> Direction:
        """Divide v by its largest entry, in place, and return it as a direction."""
        scale = largest_entry(v)
        for x in v.values():
            x.div_(scale)
        return cls(scale, v)

    def to_(self, dtype: torch.dtype | None, device: torch.device | str | None) -> Direction:
        """Cast and move the unit in place, each parameter freed before the next, and return this direction."""
        if dtype is not None or device is not None:
            for name, x in self.unit.items():
                self.unit[name] = x.to(device=device, dtype=dtype)
        return self

    def minus(self, other: Direction) -> Direction:
        """Return the difference, in memory of its own; ``other`` has the same names and devices."""
        return Direction.of_(
            {name: (self.scale * x).sub_(other.unit[name], alpha=other.scale) for name, x in self.unit.items()}
        )

    def add_to_(self, total: Params, device: torch.device | str | None = None) -> None:
        """Add scale * unit to ``total``, on ``device``, in place; names that are absent there are put in."""
        for name, x in self.unit.items():
            if name in total:
                total[name].add_(x.to(total[name].device), alpha=self.scale)
            else:
                total[name] = (self.scale * x).to(x.device if device is None else device)


class DirectionDifference(NamedTuple):
    """The direction minuend - subtrahend, formed a parameter at a time; ``subtrahend`` None is 0."""

    minuend: Direction
    subtrahend: Direction | None = None

    def over_scale(self, name: str, p: Tensor, rows: Tensor | None = None) -> Tensor | None:
        """Return (minuend - subtrahend) / minuend.scale of a parameter, in its dtype; None where there is none.

        Args:
            name: of the parameter.
            p: the parameter, for dtype and device.
            rows: int64 (n,), rows of the parameter, those that are wanted; None for all of it.
        """
        x = self.minuend.unit.get(name)
        if x is None:
            return None
        index = slice(None) if rows is None else rows.to(x.device)
        x = x[index]
        if self.subtrahend is not None:
            x = torch.sub(x, self.subtrahend.unit[name][index], alpha=self.subtrahend.scale / self.minuend.scale)
        return cast_like(x, p)

    def direction(self) -> Direction:
        """Return the difference as one direction, in memory of its own where something is subtracted."""
        return self.minuend if self.subtrahend is None else self.minuend.minus(self.subtrahend)


def shift(params: Params, direction: Params, eta: float | Tensor) -> Params:
    """Return theta + eta v in the dtype of theta.

    Args:
        params: theta by name.
        direction: v by name; parameters absent there are unchanged.
        eta: step size.
    """
    return {name: p + (eta * direction[name]).to(p.dtype) if name in direction else p for name, p in params.items()}


def shift_(direction: Params, params: Params, eta: float) -> Params:
    """Return theta + eta v in the memory of v, which has every name of theta.

    Example:
        >>> shift_({"w": torch.tensor([1.0, -2.0])}, {"w": torch.ones(2)}, 0.5)
        {'w': tensor([1.5000, 0.0000])}
    """
    return {name: direction[name].mul_(eta).add_(p) for name, p in params.items()}


def every_nth(x: Mapping[str, Tensor | None], stride: int) -> Params:
    """Return copies of every ``stride``-th entry of each tensor, of a DTensor's local shard, flat; None is left out.

    Example:
        >>> every_nth({"w": torch.arange(6).reshape(2, 3)}, 2)
        {'w': tensor([0, 2, 4])}
    """
    return {name: to_local(v.detach()).flatten()[::stride].clone() for name, v in x.items() if v is not None}


def random_direction(params: Params, seed: int) -> Params:
    """Return normal entries by name, with the root mean square of each parameter, or of all where it is 0."""
    squares = {name: float(p.double().square().sum()) for name, p in params.items()}
    overall = math.sqrt(sum(squares.values()) / max(1, sum(p.numel() for p in params.values()))) or 1.0
    generators = {p.device: torch.Generator(p.device).manual_seed(seed) for p in params.values()}
    out = {}
    for name, p in params.items():
        size = math.sqrt(squares[name] / max(1, p.numel())) or overall
        out[name] = size * torch.randn(p.shape, generator=generators[p.device], dtype=p.dtype, device=p.device)
    return out
