"""Rollouts, the batches they make, and the files that hold them."""

from fx_influence.interop.rollouts.record import Rollout, collate, grouped, write_rollouts

__all__ = ["Rollout", "collate", "grouped", "write_rollouts"]
