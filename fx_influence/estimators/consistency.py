"""Checks that two methods agree on one number: reverse mode with forward mode, and two roundings of an influence."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fx_influence.types import Apply, IdentityError, Params

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Relative residual above which a result is refused, by the lowest precision that the model computes in."""

ROUNDING_WARNED, ROUNDING_REFUSED = 0.1, 1.0
"""Shares of sum |delta_i| that ``rounding`` may reach before a warning and before a refusal.

Beyond a tenth the ranking of rollouts whose influences differ by less is in doubt; beyond all of it no sign is known.
"""


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the relative residual allowed where the lowest precision is ``dtype``; 0 for an unknown one."""
    return TOLERANCE.get(dtype, 0.0)


def identity_tolerance(params: Params, apply: Apply) -> float:
    """Return the relative residual that rounding can make in the lowest precision of the weights."""
    dtypes = {p.dtype for p in params.values()} | {getattr(apply, "compute_dtype", torch.float64)}
    return max(map(tolerance_of, dtypes))


def agree_within(residual: Tensor, terms: Tensor, reference: Tensor, bound: float) -> bool:
    """Return whether |residual| <= bound * max(sum |terms|, |reference|).

    Args:
        residual: scalar.
        terms: any shape.
        reference: scalar, the sum of the terms by another method.
        bound: relative tolerance.
    """
    return bool(residual.abs() <= bound * torch.maximum(terms.abs().sum(), reference.abs()))


def check_identity(
    method: str, residual: Tensor, terms: Tensor, reference: Tensor, bound: float, against: str = "reverse mode"
) -> None:
    """Raise ``IdentityError`` where ``terms`` and ``reference``, by two methods, differ by more than rounding can make.

    This is the adjoint (dot-product) test: reverse mode computes <u, J^T w> and forward mode <J u, w>, which are one
    number unless a derivative is lost in one of them.

    Args:
        method: how the terms were computed, for the message.
        residual: scalar, reference - sum(terms).
        terms: any shape.
        reference: scalar, their sum by the other method.
        bound: the share of max(sum |terms|, |reference|) that the residual may be.
        against: how the reference was computed, for the message.
    """
    if not agree_within(residual, terms, reference, bound):
        size = torch.maximum(terms.abs().sum(), reference.abs()).item()
        raise IdentityError(
            f"residual is {residual.item():.3g}, {abs(residual.item()) / size:.3g} of {size:.3g}; expected at most "
            f"{bound:.1g} of it: {method} gives {terms.sum().item():.6g} and {against} {reference.item():.6g}, so a "
            "derivative is lost or inexact. Check that apply is differentiable in forward mode (eager attention, no "
            "compiled or custom kernels), deterministic, and free of dropout"
        )


def check_rounding(rounding: Tensor, per_sequence: Tensor, lowest: torch.dtype, bound: float) -> None:
    """Warn where rounding rivals the influences, and raise ``IdentityError`` where it is as large as they are.

    Args:
        rounding: (n_u,), see ``Influence``; NaN is ignored.
        per_sequence: (n_u,), the influences.
        lowest: the precision that the passes ran in, for the message.
        bound: tolerance of the identity; where it exceeds ``ROUNDING_REFUSED`` it is the share that is refused instead.
    """
    size = per_sequence.abs().sum()
    share = float(rounding.nansum() / size) if size > 0 else 0.0
    if share <= ROUNDING_WARNED:
        return
    message = (
        f"rounding is {share:.2g} of the sum of |influence|; expected at most {ROUNDING_WARNED:.2g}: two methods that "
        f"are exact but for rounding in {lowest} differ by that much. Compute in higher precision (no autocast and no "
        "casts to half precision inside apply), or mistrust influences that are smaller than their rounding"
    )
    if share > max(ROUNDING_REFUSED, bound):
        raise IdentityError(message)
    warnings.warn(message, stacklevel=3)
