"""The precision of a TRL training: its autocast for the passes over U, and what of a step rounding swallows."""

from __future__ import annotations

from typing import Any

import torch

from fx_influence.core.tree import dot
from fx_influence.policy.autocast import HALF_DTYPES
from fx_influence.policy.policy import Policy
from fx_influence.types import Params

MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}
STEP_LOST = 0.1
"""Share of a step from which its loss to rounding is warned of: the measured change then misses a tenth of what the
optimizer meant."""


def in_trainers_precision(policy: Policy, accelerator: Any) -> Policy:
    """Return the policy under the autocast of the trainer's forward, with its loss scale in float16."""
    dtype = MIXED.get(accelerator.mixed_precision) if getattr(accelerator, "native_amp", False) else None
    if dtype is None:
        return policy
    scaler = getattr(accelerator, "scaler", None)
    return policy.with_autocast(dtype, 1.0 if scaler is None else float(scaler.get_scale()))


def step_rounding(moved: Params, direction: Params, lr: float) -> float:
    """Return |moved - lr v| / |lr v| over all parameters, 0 for a step of length 0.

    Example:
        >>> v = {"w": torch.tensor([3.0, 4.0])}
        >>> step_rounding({"w": torch.tensor([0.0, 2.0])}, v, lr=0.5)
        0.6
    """
    length = float(dot(direction, direction)) * lr**2
    off = {name: moved[name].double() - lr * v.double() for name, v in direction.items()}
    return (float(dot(off, off)) / length) ** 0.5 if length else 0.0


def rounding_warning(step: int, params: Params, lost: float) -> str:
    """Return the sentence for a step of which rounding swallows the share ``lost``."""
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in params.values()})
    remedy = (
        "train float32 weights (model_init_kwargs={'dtype': 'float32'}, with bf16=True for speed)"
        if any(p.dtype in HALF_DTYPES for p in params.values())
        else "at this learning rate that is the size of the step: read the measured change with that error"
    )
    return (
        f"step {step}: {lost:.0%} of the step is lost to the rounding of the trained weights, which are "
        f"{' and '.join(dtypes)}, so the policy does not move as the optimizer means it to; {remedy}"
    )
