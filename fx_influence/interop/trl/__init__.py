"""Measure entropy influence inside TRL's trainers, and control the entropy by it."""

from fx_influence.interop.trl.callback import EntropyInfluence
from fx_influence.interop.trl.control.callback import EntropyControl

__all__ = ["EntropyControl", "EntropyInfluence"]
