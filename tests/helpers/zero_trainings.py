"""TRL trainers under DeepSpeed's ZeRO on a CPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.trl.variants import Variant
from fx_influence.interop.zero.partitions import zero_optimizer
from helpers.ranks_trl import log_of, rank_trainer

TORCH_ADAMW: dict[str, Any] = {
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    }
}
"""Part of DeepSpeed's configuration with which it makes torch's AdamW itself."""


def zero_trainer(variant: Variant, out: Path, steps: int, config: dict[str, Any], **more: Any) -> Any:
    return rank_trainer(variant, out, steps, deepspeed=config, learning_rate=1e-3, **more)


def zero_outcome(training: Any) -> dict[str, Any]:
    """Return what a training run leaves: its weights, this rank's partitions of AdamW's state, and the log."""
    state = zero_optimizer(training.optimizer).optimizer.state
    tensors = {f"{k}.{name}": x.detach().clone() for k, s in enumerate(state.values()) for name, x in s.items()}
    return {"tensors": tensors | full_weights(training.model), "log": log_of(training)}


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the complete weights by name, gathered by DeepSpeed itself where it partitions them."""
    deepspeed: Any = importlib.import_module("deepspeed")
    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")]):
        return {name: p.detach().clone() for name, p in model.named_parameters()}
