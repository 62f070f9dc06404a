"""Moments as an optimizer stores them, full or quantised, and a mapping that computes one parameter at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_influence.interop.low_bit import bitsandbytes_optimizers, torchao_optimizers


class StoredMoment(NamedTuple):
    """One moment of one parameter in an optimizer's state.

    Attributes:
        shape: of the values.
        is_computed: whether reading it makes a new tensor.
        read: returns the values, in floating point.
    """

    shape: torch.Size
    is_computed: bool
    read: Callable[[], Tensor]


def stored_moment(state: dict[str, Any], key: str) -> StoredMoment | None:
    """Return a moment from the state of a parameter, None where it has none.

    Args:
        state: of the parameter, as torch, bitsandbytes or torchao keeps it; not empty.
        key: ``exp_avg``, ``exp_avg_sq`` or ``max_exp_avg_sq``.
    """
    if "state1" in state:
        stored = bitsandbytes_optimizers.stored_moment(state, key)
        if stored is not None and bitsandbytes_optimizers.is_quantised(stored):
            read = functools.partial(bitsandbytes_optimizers.dequantised, state, key)
            return StoredMoment(stored.shape, True, read)
    else:
        stored = state.get(key)
        if stored is not None and torchao_optimizers.is_quantised(stored):
            return StoredMoment(stored.shape, True, functools.partial(torchao_optimizers.dequantised, stored))
    return None if stored is None else StoredMoment(stored.shape, False, stored.detach)


def why_not_adamw(optimizer: object) -> str | None:
    """Return why a step of an optimizer of bitsandbytes or torchao is not AdamW's, with the remedy; None where it is.

    An optimizer of another library gives None too: see ``is_low_bit``.
    """
    if bitsandbytes_optimizers.is_of_bitsandbytes(optimizer):
        return bitsandbytes_optimizers.why_not_adamw(optimizer)
    return torchao_optimizers.why_not_adamw(optimizer) if torchao_optimizers.is_of_torchao(optimizer) else None


def is_low_bit(optimizer: object) -> bool:
    """Return whether an optimizer is one of bitsandbytes or torchao, whatever its step."""
    return bitsandbytes_optimizers.is_of_bitsandbytes(optimizer) or torchao_optimizers.is_of_torchao(optimizer)


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """Return the param_groups, in which all parameters of a group have its hyperparameters."""
    if bitsandbytes_optimizers.is_of_bitsandbytes(optimizer):
        return bitsandbytes_optimizers.groups_of(optimizer)
    groups: list[dict[str, Any]] = optimizer.param_groups
    return groups


class ComputedMoments(Mapping[str, Tensor]):
    """Moments by parameter name, the computed ones new at each access, so that one at a time is in memory.

    Args:
        reads: by name, a function that returns the moment.

    Example:
        >>> codes = torch.tensor([0, 2], dtype=torch.uint8)
        >>> moments = ComputedMoments({"w": lambda: 0.5 * codes.float()})
        >>> list(moments), moments["w"].tolist()
        (['w'], [0.0, 1.0])
    """

    def __init__(self, reads: Mapping[str, Callable[[], Tensor]]) -> None:
        self._reads = dict(reads)

    def __getitem__(self, name: str) -> Tensor:
        return self._reads[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._reads

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)
