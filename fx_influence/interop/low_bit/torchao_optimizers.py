"""AdamW of torchao: moments in 8 or 4 bits or in float8, in tensors of a class of their own.

A step dequantises the moments, updates them in float32, moves the weights by the updated ones and quantises them again:
it is AdamW's step from the dequantised moments, to the rounding of float32; bias corrections are float32 too, which
moves beta2's by up to 6e-5 of itself. Parameters with fewer than 4096 entries, or a number that blocks do not divide,
have plain moments in the parameter's dtype. With ``bf16_stochastic_round``, weights in bfloat16 are rounded at random:
the step is AdamW's on average, and each differs from it by that rounding. ``Adam8bit`` and its kind add the weight
decay to the gradient, so they are AdamW without weight decay.

Nothing of torchao is imported. Source: torchao 0.18.0, ``optim/adam.py``.
"""

from __future__ import annotations

import math
from typing import Any, cast

from torch import Tensor

from fx_influence.core.dtensor import is_sharded

_PACKAGES = ("torchao.optim", "torchao.prototype.low_bit_optim")


def is_of_torchao(optimizer: object) -> bool:
    """Return whether an optimizer, or a class that it is derived from, is one of torchao's."""
    return any(kind.__module__.startswith(_PACKAGES) for kind in type(optimizer).__mro__)


def why_not_adamw(optimizer: Any) -> str | None:
    """Return why a step of this optimizer of torchao is not AdamW's, with the remedy; None where it is."""
    remedy = "Train with AdamW8bit, AdamW4bit or AdamWFp8"
    if not hasattr(optimizer, "is_adamw"):
        return f"it keeps its moments in other optimizers or in another way; expected torchao >= 0.8. {remedy}"
    if math.isinf(optimizer.block_size):
        return f"it rounds quantised weights; expected weights in floating point. {remedy}"
    for index, group in enumerate(optimizer.param_groups):
        decay = float(group["weight_decay"])
        if decay and not optimizer.is_adamw:
            return f"weight_decay is {decay} in param_groups[{index}], part of the gradient; expected 0. {remedy}"
    return None


def is_quantised(stored: Tensor) -> bool:
    """Return whether a moment is of a class of torchao's, or a DTensor whose shards are."""
    local = cast(Any, stored)._local_tensor if is_sharded(stored) else stored
    return type(local).__module__.startswith("torchao.")


def dequantised(stored: Tensor) -> Tensor:
    """Return a quantised moment in float32; a DTensor stays one, with the same shards."""
    if not is_sharded(stored):
        return cast(Tensor, cast(Any, stored).dequantize())
    from torch.distributed.tensor import DTensor

    sharded = cast(Any, stored)
    return DTensor.from_local(
        sharded._local_tensor.dequantize(),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=stored.shape,
        stride=stored.stride(),
    )
