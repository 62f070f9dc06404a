"""The outside world turned into pure values: optimizers, checkpoints, prompts, rewards, rollouts, trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fx_influence.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from fx_influence.interop.checkpoints.load import load_checkpoint
    from fx_influence.interop.checkpoints.optimizer_state import restore_optimizer
    from fx_influence.interop.checkpoints.sharded import load_sharded_checkpoint
    from fx_influence.interop.loop.attach import attach
    from fx_influence.interop.loop.capture import StepCapture
    from fx_influence.interop.optimizers import adamw_state
    from fx_influence.interop.rollouts.batch import collate
    from fx_influence.interop.rollouts.read import read_rollouts
    from fx_influence.interop.rollouts.record import Rollout
    from fx_influence.interop.sampling import sample

_MODULES = {
    "Rollout": "fx_influence.interop.rollouts.record",
    "StepCapture": "fx_influence.interop.loop.capture",
    "adamw_state": "fx_influence.interop.optimizers",
    "attach": "fx_influence.interop.loop.attach",
    "collate": "fx_influence.interop.rollouts.batch",
    "load_checkpoint": "fx_influence.interop.checkpoints.load",
    "load_sharded_checkpoint": "fx_influence.interop.checkpoints.sharded",
    "read_rollouts": "fx_influence.interop.rollouts.read",
    "restore_optimizer": "fx_influence.interop.checkpoints.optimizer_state",
    "sample": "fx_influence.interop.sampling",
}

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)

__all__ = [
    "Rollout",
    "StepCapture",
    "adamw_state",
    "attach",
    "collate",
    "load_checkpoint",
    "load_sharded_checkpoint",
    "read_rollouts",
    "restore_optimizer",
    "sample",
]
