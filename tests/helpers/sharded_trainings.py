"""Options of TRL trainers under FSDP2, and the values of what FSDP2 has sharded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

FSDP2: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]},
}
"""Options of a trainer's config, for units of one layer of ``benchmarks.trl.variants.policy`` each."""


def full_tree(tree: Mapping[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Return values by name with all of every DTensor, on every rank, in ``dtype`` unless it is None."""
    gathered = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in tree.items()}
    return {name: None if x is None else x.to(dtype or x.dtype) for name, x in gathered.items()}
