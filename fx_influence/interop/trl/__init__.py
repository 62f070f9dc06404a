"""Measure entropy influence inside TRL's trainers."""

from fx_influence.interop.trl.callback import EntropyInfluence

__all__ = ["EntropyInfluence"]
