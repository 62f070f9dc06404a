"""Whether the weights of a forward in half precision are the roundings of the float32 weights that AdamW moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fx_influence.core.dtensor import before_collective


def count_unrounded(weights: Tensor, masters: Tensor) -> Tensor:
    """Return the number of weights that are not the roundings of others to their dtype, int64 scalar.

    Example:
        >>> count_unrounded(torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([1.001, 2.5]))
        tensor(1)
    """
    return (weights.detach() != masters.detach().to(weights.dtype)).sum()


def check_roundings(differing: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` on every process where any of them has weights that are not roundings.

    Args:
        differing: counts of ``count_unrounded`` for this process's parts, int64 scalars.
    """
    count = torch.stack(list(differing)).sum()
    before_collective()
    dist.all_reduce(count)
    if count:
        raise ValueError(
            f"{int(count)} of the model's weights are not those that DeepSpeed's optimizer moves, rounded to their "
            "dtype; expected all, or its step begins elsewhere. Call engine.optimizer.refresh_fp32_params() after "
            "loading weights into the model"
        )
