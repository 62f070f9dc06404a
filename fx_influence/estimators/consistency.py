"""Whether two routes to one number agree: the identity of reverse and forward mode, and rounding."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fx_influence.types import (
    Apply,
    IdentityError,
    Params,
)

if TYPE_CHECKING:
    pass


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Relative residual above which a result is refused, by the lowest precision that the model computes in."""


ROUNDING_WARNED, ROUNDING_REFUSED = 0.1, 1.0
"""Shares of sum |delta_i| that ``rounding`` may reach.

A tenth leaves the ranking of rollouts whose influences differ by less in doubt, a whole leaves no sign known.
"""


def identity_tolerance(params: Params, apply: Apply) -> float:
    """The relative residual that rounding can make in the lowest precision of the weights."""
    dtypes = {p.dtype for p in params.values()} | {getattr(apply, "compute_dtype", torch.float64)}
    return max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes)


def check_rounding(rounding: Tensor, per_sequence: Tensor, lowest: torch.dtype, bound: float) -> None:
    """Warn where rounding rivals the influences, and raise ``IdentityError`` where it is as large as they are.

    Args:
        rounding: (n_u,), see ``Influence``; NaN is passed over.
        per_sequence: (n_u,), the influences.
        lowest: the precision that the passes ran in, for the message.
        bound: the identity's; one above ``ROUNDING_REFUSED``, as infinity, allows so much rounding too.
    """
    size = per_sequence.abs().sum()
    share = float(rounding.nansum() / size) if size > 0 else 0.0
    if share <= ROUNDING_WARNED:
        return
    message = (
        f"rounding is {share:.2g} of the sum of |influence|: two routes to each influence, exact but for rounding in "
        f"{lowest}, differ by that much. Compute in higher precision (no autocast and no casts to half precision "
        "inside apply), or mistrust influences that are smaller than their rounding"
    )
    if share > max(ROUNDING_REFUSED, bound):
        raise IdentityError(message)
    warnings.warn(message, stacklevel=3)


def _within(residual: Tensor, per_sequence: Tensor, whole: Tensor, bound: float) -> bool:
    return bool(residual.abs() <= bound * torch.maximum(per_sequence.abs().sum(), whole.abs()))


def check_identity(
    route: str, residual: Tensor, parts: Tensor, whole: Tensor, bound: float, against: str = "reverse mode"
) -> None:
    """Raise ``IdentityError`` where ``parts`` and ``whole``, by two routes, differ by more than rounding can make.

    ``residual``: whole - sum(parts), scalar. ``bound``: what it may be of max(sum |parts|, |whole|). ``route``,
    ``against``: how the parts and the whole were computed, for the message.
    """
    if not _within(residual, parts, whole, bound):
        size = torch.maximum(parts.abs().sum(), whole.abs()).item()
        raise IdentityError(
            f"{route} gives {parts.sum().item():.6g} for all parts together and {against} "
            f"{whole.item():.6g}: the residual {residual.item():.3g} is {abs(residual.item()) / size:.3g} of "
            f"{size:.3g}, allowed {bound:.1g}. A derivative is lost or inexact: check that apply is differentiable in "
            "forward mode (eager attention, no compiled or custom kernels), deterministic, and free of dropout"
        )
