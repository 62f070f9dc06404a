"""AdamW of bitsandbytes: blockwise 8-bit or 32-bit moments, in GPU memory or paged.

Its ``Adam`` and ``AdamW`` are one optimizer, ``optimizer_name == "adam"``, whose weight decay is decoupled in both. A
step dequantises the moments, updates them in float32, moves the weights by the updated ones and quantises them again:
it is AdamW's step from the dequantised moments, to the rounding of float32. Parameters with fewer than
``min_8bit_size`` entries have 32-bit moments. ``amsgrad`` is accepted by its 32-bit classes, and ignored. Its CUDA
kernels apply the weight decay after the update, which differs from AdamW's order by a factor 1 - lr * weight_decay on
the update.

Nothing of bitsandbytes is imported. Source: bitsandbytes 0.50.2, ``optim/optimizer.py`` and ``csrc/kernels.cu``; of
older versions, blocks of 2048 entries and the options ``percentile_clipping`` and ``block_wise``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fx_influence.core.dtensor import is_sharded

BLOCKS = (256, 2048)
"""Entries that share a scale, since version 0.44 and before."""

_FIELDS = {"exp_avg": "1", "exp_avg_sq": "2"}
_HYPER = ("lr", "betas", "eps", "weight_decay")


def is_of_bitsandbytes(optimizer: object) -> bool:
    """Return whether an optimizer, or a class that it is derived from, is of bitsandbytes."""
    return any(kind.__module__.startswith("bitsandbytes.optim") for kind in type(optimizer).__mro__)


def why_not_adamw(optimizer: Any) -> str | None:
    """Return why a step of this optimizer of bitsandbytes is not AdamW's, with the remedy; None where it is."""
    name = getattr(optimizer, "optimizer_name", None)
    if name != "adam":
        return f"optimizer_name is {name!r}; expected 'adam'. Train with AdamW8bit, PagedAdamW8bit or AdamW"
    for config in (_config(optimizer, g, p) for g, p in _indices(optimizer)):
        clipping, max_norm = config.get("percentile_clipping", 100), config.get("max_unorm", 0.0)
        if clipping < 100:
            return (
                f"percentile_clipping is {clipping}; expected 100, since it clips each parameter's gradient by a norm "
                "of its own. Leave it out, and clip by max_grad_norm"
            )
        if max_norm > 0:
            return f"max_unorm is {max_norm}; expected 0, since it rescales the update. Leave it out"
        if config.get("skip_zeros"):
            return "skip_zeros is True; expected False, since entries without a gradient do not decay. Leave it out"
        if not config.get("block_wise", True) and config.get("optim_bits") == 8:
            return "block_wise is False; expected True, the blocks that its scales belong to. Leave it out"
    return None


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """Return the param_groups with the hyperparameters that ``GlobalOptimManager`` overrides for single parameters.

    A group is divided where its parameters' hyperparameters differ; the order of the parameters stays.
    """
    groups: list[dict[str, Any]] = []
    last: tuple[Any, ...] = ()
    for g, p in _indices(optimizer):
        group, config = optimizer.param_groups[g], _config(optimizer, g, p)
        hyper = {field: config[field] for field in _HYPER}
        if not groups or last != (g, hyper):
            groups.append({**group, **hyper, "params": []})
        groups[-1]["params"].append(group["params"][p])
        last = g, hyper
    return groups


def stored_moment(state: dict[str, Any], key: str) -> Tensor | None:
    """Return a moment of a parameter's state as it is stored, as codes or in float32; None where there is none.

    Args:
        state: of the parameter, not empty.
        key: ``exp_avg`` or ``exp_avg_sq``.

    Raises:
        ValueError: the entries are not in the order of memory, which its kernels go by, or are sharded.
    """
    stored: Tensor | None = state.get(f"state{_FIELDS[key]}") if key in _FIELDS else None
    if stored is not None and is_sharded(stored):
        raise ValueError(
            f"optimizer state state{_FIELDS[key]} of bitsandbytes is sharded, whose kernels know no shards; expected "
            "whole parameters. Train with AdamW8bit of torchao under FSDP2"
        )
    if stored is not None and not stored.is_contiguous():
        raise ValueError(
            f"optimizer state state{_FIELDS[key]} has strides {stored.stride()} for shape {tuple(stored.shape)}; "
            "expected contiguous entries, as its kernels take them. Make the parameters contiguous before the optimizer"
        )
    return stored


def is_quantised(stored: Tensor) -> bool:
    """Return whether a stored moment is codes."""
    return stored.dtype == torch.uint8


def dequantised(state: dict[str, Any], key: str) -> Tensor:
    """Return a quantised moment in float32, in its parameter's shape, on the device of its scales.

    Args:
        state: of the parameter.
        key: ``exp_avg`` or ``exp_avg_sq``.

    Raises:
        ValueError: the scales are not those of blocks.

    Example:
        >>> state = {"state1": torch.tensor([[0, 1]], dtype=torch.uint8)}
        >>> state |= {"qmap1": torch.tensor([0.0, 0.5]), "absmax1": torch.tensor([4.0])}
        >>> dequantised(state, "exp_avg")
        tensor([[0., 2.]])
    """
    field = _FIELDS[key]
    codes, table, scales = (state.get(name + field) for name in ("state", "qmap", "absmax"))
    assert codes is not None
    count = codes.numel()
    block = next((b for b in BLOCKS if scales is not None and scales.shape == (-(-count // b),)), None)
    if table is None or scales is None or block is None:
        shape = None if scales is None else tuple(scales.shape)
        raise ValueError(
            f"optimizer state absmax{field} has shape {shape} for {count} codes; expected a scale for each block of "
            f"{' or '.join(map(str, BLOCKS))}. Update bitsandbytes, and train with block_wise=True"
        )
    # Paged codes are in memory that the device shares with the CPU, where torch takes them to be.
    values: Tensor = table.index_select(0, codes.detach().flatten().to(device=table.device, dtype=torch.int32))
    complete = count - count % block
    values[:complete].view(-1, block).mul_(scales[: complete // block, None])
    values[complete:].mul_(scales[complete // block :])
    return values.view(codes.shape)


def _indices(optimizer: Any) -> list[tuple[int, int]]:
    return [(g, p) for g, group in enumerate(optimizer.param_groups) for p in range(len(group["params"]))]


def _config(optimizer: Any, g: int, p: int) -> dict[str, Any]:
    """Return the settings of one parameter, by the indices of its group and its place there, as ``step`` has them."""
    group = optimizer.param_groups[g]
    config: dict[str, Any] = dict(optimizer.get_config(g, p, group))
    if not optimizer.initialized:
        # The first step looks these up.
        for module, attribute, override in optimizer.mng.module_weight_config_triple:
            if getattr(module, attribute, None) is group["params"][p]:
                config.update(override)
    return config
