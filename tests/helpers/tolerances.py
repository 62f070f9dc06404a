"""Bounds on rounding: the only source of floating-point tolerances in the tests.

Results differ between processors (the width of their vectors decides the order in which sums are added up), numbers of
threads, ranks and versions. So no test compares with a figure that one machine gave. Each says what was computed, and a
bound follows from the dtype, the number of roundings and the magnitudes:

    bound = ROOM * eps(dtype) * sqrt(terms) * magnitude

Roundings are independent and as often up as down, so ``terms`` of them amount to sqrt(terms) of one (Higham and Mary,
2019); each of two compared results has its own, eps / 2 a rounding. ROOM is an order of magnitude beyond that, and
makes the bound at least the worst case, ``terms`` roundings of one sign, up to 100 terms.

How to choose:

- ``dtype``: in which the values were computed, the coarsest on the way: float32 for a float64 array read from a file of
  a float32 run. Left out, the coarser dtype of the two compared.
- ``terms``: the roundings on the way to one entry: terms of the longest sum, and one for each multiplication or
  function after it. Generous is cheap: a hundredfold count is ten times the bound. For what passes through a policy:
  ``policy_terms(params, width)``, and ``TINY_POLICY`` for the policies of ``cases`` and ``strategies``.
- ``scale``: the size of the addends, not of the sum: ``parts.abs().sum()`` where parts cancel. Left out, the
  largest entry of the expected values. Never 1 where values are 1e-6.

Where this bound is not far below the fault that a test looks for (a lost term, a wrong factor), compute in float64, let
the values be larger, or compare both with a float64 computation beside (``exact_bound``). Differences of finite steps
have an error of truncation too: ``central_difference`` returns derivative and bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fx_influence.types import Params

# Number of standard deviations between the expected error and the largest allowed one.
ROOM = 10.0
HALVES = (torch.bfloat16, torch.float16)
# policy_terms of the widest policy of ``cases`` and ``strategies``, rounded up; test_tolerances holds it to that.
TINY_POLICY = 4000


def as_tensor(x: Any) -> Tensor:
    """Return a detached floating-point tensor; numbers and integer tensors become float64."""
    tensor = x.detach() if isinstance(x, Tensor) else torch.as_tensor(np.array(x))
    return tensor if tensor.is_floating_point() else tensor.double()


def rounding_bound(dtype: torch.dtype, terms: float = 1, magnitude: Any = 1.0) -> float:
    """Return ROOM * eps * sqrt(terms) * max |magnitude|, the allowed rounding difference of two results of one formula.

    Args:
        dtype: of the computation.
        terms: roundings on the way to one entry.
        magnitude: number, tensor or array: the size of the addends; its largest entry counts.
    """
    size = as_tensor(magnitude).double().abs()
    return ROOM * torch.finfo(dtype).eps * terms**0.5 * float(size.max() if size.numel() else 0.0)


def policy_terms(params: Params, width: int, passes: int = 3) -> int:
    """Return the number of roundings on the way of one value through a policy and back.

    Every weight adds over one of its axes forward and over another backward, and each is followed by what adds over the
    ``width`` tokens of a row (attention, a gradient) and by one function (a norm, an activation). In half precision an
    operation adds up in float32 and rounds once, so each weight counts as one rounding per pass.

    Args:
        params: shapes determine the sizes of the sums, dtypes whether they are of half precision.
        width: tokens of the longest row.
        passes: 1 for logits, log-probabilities and entropies; 2 for gradients or tangents; 3 for their products, which
            is every influence.
    """
    return passes * sum(1 if p.dtype in HALVES else sum(p.shape) + width + 1 for p in params.values())


def assert_close_to_rounding(
    actual: Any, expected: Any, *, terms: float, scale: Any = None, dtype: torch.dtype | None = None, name: str = ""
) -> None:
    """Assert that entries differ by no more than ``rounding_bound``; NaN equals NaN, infinities equal themselves.

    Args:
        actual: tensor, array or number.
        expected: of the same shape.
        terms: roundings on the way to one entry.
        scale: the size of the addends, by its largest entry; default: the expected values.
        dtype: of the computation; default: the coarser dtype of the two.
        name: shown where they differ.
    """
    a, b = as_tensor(actual), as_tensor(expected)
    assert a.shape == b.shape, f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    coarse = dtype or max((a.dtype, b.dtype), key=lambda d: torch.finfo(d).eps)
    finite = b[b.isfinite()] if scale is None else scale
    assert_within(a, b, rounding_bound(coarse, terms, finite), name)


def assert_within(actual: Any, expected: Any, bound: float, name: str = "") -> None:
    """Assert that no entry differs by more than ``bound``, which comes from a function of this module."""
    torch.testing.assert_close(
        as_tensor(actual).double(),
        as_tensor(expected).double(),
        rtol=0,
        atol=bound,
        equal_nan=True,
        msg=lambda message: f"{name}: {message}" if name else message,
    )


def exact_bound(rounded: Any, exact: Any, terms: float = 1, dtype: torch.dtype | None = None) -> float:
    """Return ROOM times the error of ``rounded`` beside float64's ``exact``, and ``rounding_bound`` at least.

    For results whose roundings are hard to count: another method in the same dtype errs as much as this one does,
    beside the same float64 computation. ``exact`` begins with the very same inputs, rounded to the lower dtype first.

    Args:
        rounded: the result of one method in the lower dtype.
        exact: the same values from a computation in float64.
        terms: roundings on the way to one entry, for the least bound, as one method may be exact by chance.
        dtype: of the least bound; default: that of ``rounded``.
    """
    low, high = as_tensor(rounded), as_tensor(exact)
    error = float((low.double() - high.double()).abs().max())
    return max(ROOM * error, rounding_bound(dtype or low.dtype, terms, high))


class Difference(NamedTuple):
    """A derivative by finite steps, and the bound on its errors of truncation and rounding."""

    slope: Tensor
    bound: float


def central_difference(
    f: Callable[[float], Tensor], width: float, *, terms: float, magnitude: Any = None, dtype: torch.dtype | None = None
) -> Difference:
    """Return f'(0) from steps of one and two widths (Richardson), with the bound of its error.

    D(h) = [f(h) - f(-h)] / 2h errs by C h^2, so [4 D(h) - D(2h)] / 3 errs by less than |D(h) - D(2h)| = 3 C h^2; the
    rounding of f is divided by h. Choose a width at which neither hides the fault: near eps^(1/3) of the range of f.

    Args:
        f: step -> tensor, smooth within two widths of 0.
        width: h.
        terms: roundings on the way to one entry of f.
        magnitude: the size of the addends of f; default: its largest value.
        dtype: in which f computes; default: that of its result.
    """
    one, minus_one, two, minus_two = (f(k * width).detach() for k in (1.0, -1.0, 2.0, -2.0))
    near, wide = (one - minus_one) / (2 * width), (two - minus_two) / (4 * width)
    size = torch.stack([one, minus_one, two, minus_two]).abs().max() if magnitude is None else magnitude
    rounding = rounding_bound(dtype or one.dtype, terms, size) / width
    return Difference((4 * near - wide) / 3, float((near - wide).abs().max()) + rounding)


def central_curvature(
    f: Callable[[float], Tensor], width: float, *, terms: float, magnitude: Any = None, dtype: torch.dtype | None = None
) -> Difference:
    """Return f''(0) with the bound of its error, as ``central_difference`` does f'(0); rounding is divided by h^2.

    Choose a width near eps^(1/4) of the range of f.
    """
    one, minus_one, two, minus_two, middle = (f(k * width).detach() for k in (1.0, -1.0, 2.0, -2.0, 0.0))
    near, wide = (one + minus_one - 2 * middle) / width**2, (two + minus_two - 2 * middle) / (2 * width) ** 2
    size = torch.stack([one, minus_one, two, minus_two, middle]).abs().max() if magnitude is None else magnitude
    rounding = 4 * rounding_bound(dtype or one.dtype, terms, size) / width**2
    return Difference((4 * near - wide) / 3, float((near - wide).abs().max()) + rounding)
