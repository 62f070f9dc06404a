"""Gradient clipping: its factor, and the gradient before it, read from the one after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fx_influence.core.dtensor import reduce_over_shards, to_local
from fx_influence.core.tree import promote
from fx_influence.types import Gradients, Params


class UnclippedGradient(Mapping[str, Tensor | None]):
    """The gradient before clipping, from the one after it: each entry is divided at each access, and none is held.

    A trainer multiplies its gradient by one factor, in place. Dividing by it gives what was there before but for the
    rounding of either, at most one unit in the last place each; a copy made before would take another vector of the
    parameters' size. ``AdamWStep`` divides a block of entries at a time.

    Args:
        clipped: the gradient by name, as the optimizer meets it; None where backward never reached the parameter.
        factor: that the gradient was multiplied by, above 0.

    Example:
        >>> gradient = UnclippedGradient({"w": torch.tensor([1.0, 2.0]), "b": None}, factor=0.5)
        >>> gradient["w"].tolist(), gradient["b"], list(gradient)
        ([2.0, 4.0], None, ['w', 'b'])
    """

    def __init__(self, clipped: Gradients, factor: float) -> None:
        self.clipped, self.factor = clipped, factor

    def __getitem__(self, name: str) -> Tensor | None:
        g = self.clipped[name]
        return None if g is None else g / self.factor

    def __contains__(self, name: object) -> bool:
        return name in self.clipped

    def __iter__(self) -> Iterator[str]:
        return iter(self.clipped)

    def __len__(self) -> int:
        return len(self.clipped)


def stored_gradient(grads: Mapping[str, Tensor | None]) -> tuple[Mapping[str, Tensor | None], float]:
    """Return the tensors that hold a gradient, and what they are to be divided by: 1 unless it is unclipped."""
    return (grads.clipped, grads.factor) if isinstance(grads, UnclippedGradient) else (grads, 1.0)


def clip_factor(grads: Mapping[str, Tensor | None], max_grad_norm: float | None, params: Params) -> Tensor:
    """Return kappa = min(1, max_grad_norm / (|g| + 1e-6)), scalar; 1 without a gradient or a norm.

    Args:
        grads: g by name, None where backward never reached the parameter.
        max_grad_norm: the trainer's; None clips nothing.
        params: theta by name, for dtype and device.

    Raises:
        ValueError: for a gradient whose norm is not finite.
    """
    first = to_local(next(iter(params.values())))
    one = torch.ones((), dtype=promote(first.dtype), device=first.device)
    stored, factor = stored_gradient(grads)
    reached = [g for g in stored.values() if g is not None]
    if not reached:
        return one
    norm = torch.stack([n.to(one) for n in _norms(reached)]).norm() / factor
    if not torch.isfinite(norm):
        raise ValueError(
            f"grads has norm {norm.item()}; expected a finite norm, or the step has no direction. Drop the batch"
        )
    return one if max_grad_norm is None else (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)


def _norms(grads: list[Tensor]) -> list[Tensor]:
    norms = [to_local(g).to(promote(g.dtype)).norm().double() for g in grads]
    return [square.sqrt() for square in reduce_over_shards([norm.square() for norm in norms], grads)]
