"""Optimizer steps as stateless maps from a batch's gradient to a direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fx_influence.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from fx_influence.optim.adamw import AdamWDecomposition, adamw_decompose
    from fx_influence.types import AdamWHyper, AdamWState

_MODULES = {
    "AdamWDecomposition": "fx_influence.optim.adamw",
    "AdamWHyper": "fx_influence.types",
    "AdamWState": "fx_influence.types",
    "adamw_decompose": "fx_influence.optim.adamw",
}

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)

__all__ = ["AdamWDecomposition", "AdamWHyper", "AdamWState", "adamw_decompose"]
