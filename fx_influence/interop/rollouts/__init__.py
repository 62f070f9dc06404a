"""Rollouts in memory, as batches and as files of this library and of trainers."""

from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.native_format import write_rollouts
from fx_influence.interop.rollouts.read import read_rollouts
from fx_influence.interop.rollouts.record import Rollout

__all__ = ["Rollout", "collate", "read_rollouts", "write_rollouts"]
