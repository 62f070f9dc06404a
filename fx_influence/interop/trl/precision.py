"""The precision of a TRL trainer's forward: its autocast and loss scale."""

from __future__ import annotations

from typing import Any

import torch

from fx_influence.interop.live.precision import in_forward_precision
from fx_influence.policy.policy import Policy

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""accelerate's names of mixed precision -> the dtype of its autocast."""


def in_trainers_precision(policy: Policy, accelerator: Any) -> Policy:
    """Return the policy in the mixed precision of the trainer's forward, with its loss scale in float16."""
    dtype = AUTOCAST_DTYPES.get(accelerator.mixed_precision) if getattr(accelerator, "native_amp", False) else None
    scaler = getattr(accelerator, "scaler", None)
    return in_forward_precision(policy, dtype, 1.0 if scaler is None else float(scaler.get_scale()))
