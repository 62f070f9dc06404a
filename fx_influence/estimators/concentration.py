"""Concentration: the share of a total that few entries hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def top_share(values: Tensor, fraction: float) -> Tensor:
    """Return the share of sum |values| that the largest ceil(fraction n) entries hold.

    Args:
        values: any shape, n entries, without those that do not count, such as tokens outside completions.
        fraction: in (0, 1].

    Returns:
        float64 scalar; NaN where all values are 0.

    Raises:
        ValueError: for no entries, or a fraction outside (0, 1].

    Example:
        >>> top_share(torch.tensor([-6.0, 1.0, 1.0, 0.0]), 0.25).item()
        0.75
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; expected a number in (0, 1]. 0.01 is the largest hundredth")
    if not values.numel():
        raise ValueError("values is empty; expected at least one entry. Skip batches without completion tokens")
    sizes = values.detach().flatten().double().abs()
    largest = torch.topk(sizes, math.ceil(fraction * len(sizes))).values
    return largest.sum() / sizes.sum()
