"""Moments as an optimizer stores them, full or quantised."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_influence.core.dtensor import to_local, to_numbers
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


def check_values(
    stored: Sequence[tuple[str, str, StoredMoment]], combine: Callable[[Sequence[Tensor]], list[Tensor]] | None = None
) -> None:
    """Raise ``ValueError`` for moments that AdamW cannot hold; wait for each device once.

    Args:
        stored: parameter, key and moment of each.
        combine: makes the flags of all processes from those of this one, where each has a partition and all raise.
    """
    flags = [_impossible(key, moment).any() for _, key, moment in stored]
    if combine is not None and flags:
        flags = combine(flags)
    for (name, key, moment), flag in zip(stored, to_numbers(flags), strict=True):
        if flag:
            bad = _local_values(moment)[_impossible(key, moment)].tolist()
            values = f"{bad[0]} ({len(bad)} such values)" if bad else "others on another process"
            raise ValueError(
                f"optimizer state {key} of {name} holds {values}; expected what AdamW can hold, finite values. Take an "
                "earlier checkpoint, from before the training diverged"
            )


def _impossible(key: str, moment: StoredMoment) -> Tensor:
    """Return where the local entries of a moment are not what AdamW can hold."""
    local = _local_values(moment)
    return ~torch.isfinite(local) if key == "exp_avg" else ~torch.isfinite(local) | (local < 0)


def _local_values(moment: StoredMoment) -> Tensor:
    """Return the entries of a moment that this process holds."""
    return to_local(moment.read())
