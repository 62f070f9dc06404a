"""Tensors put together from the partitions of ZeRO.

ZeRO-1 and 2 lay the parameters of a group behind each other in one vector, which is padded and divided into as many
partitions as there are ranks. ZeRO-3 divides each parameter, padded, and lays a rank's shares of a sub-group behind
each other. Source: deepspeedai/DeepSpeed, deepspeed/utils/zero_to_fp32.py, deepspeed/runtime/zero/stage_1_and_2.py and
stage3.py at commit edaa722.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Shapes = Mapping[str, Sequence[int]]


def join_vector(partitions: Sequence[Tensor], shapes: Shapes, subject: str) -> dict[str, Tensor]:
    """Return the parameters of a group of ZeRO-1 or 2.

    Args:
        partitions: of each rank, of one axis; the last may lack its padding.
        shapes: of the parameters by name, in the order of the vector.
        subject: for the error.

    Raises:
        ValueError: if the partitions do not hold as much as the shapes say, and padding.

    Example:
        >>> join_vector([torch.arange(3), torch.arange(3, 5)], {"a": (2, 2), "b": (1,)}, "it")["b"]
        tensor([4])
    """
    flat = torch.cat([partition.reshape(-1) for partition in partitions])
    sizes = [math.prod(shape) for shape in shapes.values()]
    # Groups are padded to a multiple of twice the number of ranks.
    if not sum(sizes) <= flat.numel() < sum(sizes) + 2 * len(partitions):
        raise _misfit(subject, [partition.numel() for partition in partitions], sum(sizes))
    pieces = flat[: sum(sizes)].split(sizes)
    return {name: piece.view(*shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def join_shares(partitions: Sequence[Tensor], shapes: Shapes, subject: str) -> dict[str, Tensor]:
    """Return the parameters of a sub-group of ZeRO-3; the arguments are those of ``join_vector``.

    Raises:
        ValueError: if the partitions do not hold as much as the shapes say.

    Example:
        >>> join_shares([torch.tensor([1, 2, 5]), torch.tensor([3, 0, 6])], {"a": (3,), "b": (2,)}, "it")
        {'a': tensor([1, 2, 3]), 'b': tensor([5, 6])}
    """
    ranks = len(partitions)
    shares = [-(-math.prod(shape) // ranks) for shape in shapes.values()]
    if {partition.numel() for partition in partitions} != {sum(shares)}:
        raise _misfit(subject, [partition.numel() for partition in partitions], sum(shares) * ranks)
    by_rank = [partition.reshape(-1).split(shares) for partition in partitions]
    joined = {}
    for (name, shape), *pieces in zip(shapes.items(), *by_rank, strict=True):
        joined[name] = torch.cat(pieces)[: math.prod(shape)].view(*shape)
    return joined


def _misfit(subject: str, sizes: list[int], expected: int) -> ValueError:
    return ValueError(
        f"{subject} has partitions of {sizes} elements; expected {expected} in all, as param_shapes says. Take the "
        "files of all ranks from one save"
    )
