"""How much of a total lies in few of its parts."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def top_share(values: Tensor, fraction: float) -> Tensor:
    """Share of sum |values| that its largest ceil(fraction n) entries hold; float64 scalar, NaN where all are 0.

    ``values``: any shape, n entries; leave out what does not count, such as tokens outside completions.
    Raises ``ValueError`` for no entries or a fraction outside (0, 1].

    Example:
        >>> top_share(torch.tensor([-6.0, 1.0, 1.0, 0.0]), 0.25).item()
        0.75
    """
    if not 0 < fraction <= 1 or not values.numel():
        raise ValueError(f"fraction is {fraction} of {values.numel()} values; give a fraction in (0, 1] of some values")
    sizes = values.detach().flatten().double().abs()
    largest = torch.topk(sizes, math.ceil(fraction * len(sizes))).values
    return largest.sum() / sizes.sum()
