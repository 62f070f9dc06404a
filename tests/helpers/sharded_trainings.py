"""TRL trainers under FSDP2 on a CPU, and the values of what FSDP2 has sharded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

FSDP2: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]},
}
"""Options of a trainer's config, for units of one layer of ``benchmarks.trl.variants.policy`` each."""


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Make accelerate shard the models of trainers that are made inside; on a CPU it would replicate them.

    It does so for processes of the kind ``MULTI_GPU``, of which nothing else depends here: the device stays the CPU and
    the collectives gloo's.
    """
    init = PartialState.__init__

    def init_as_gpus(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self._shared_state["distributed_type"] is DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialState, "__init__", init_as_gpus)
        yield


def full_tree(tree: Mapping[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Return values by name with all of every DTensor, on every rank, in ``dtype`` unless it is None."""
    gathered = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in tree.items()}
    return {name: None if x is None else x.to(dtype or x.dtype) for name, x in gathered.items()}
