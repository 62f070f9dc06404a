"""AdamW state dicts of a checkpoint directory, in any of the formats that are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fx_influence.interop.checkpoints.adamw_format import require_adamw_state_dict
from fx_influence.interop.checkpoints.files.directory import OPTIMIZER, OPTIMIZER_KEYS, require_any_file
from fx_influence.interop.checkpoints.layout import Layout
from fx_influence.interop.low_bit.saved_states import with_full_moments


def read_optimizer_state_dict(layout: Layout) -> dict[str, Any]:
    """Read the optimizer's state dict.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: for damaged files and for more than tensors and plain values.
        TypeError: for the state of another optimizer.
    """
    if layout.read_optimizer is None:
        remedy = "{'optim': ...} with torch.distributed.checkpoint.save, or pass optimizer=False for the policy alone"
        require_any_file(layout.path, OPTIMIZER, f"save optimizer.state_dict() there, or {remedy}")
        raise AssertionError("find_layout takes each of these files")
    return _checked(layout.read_optimizer(layout.config))


def read_dcp_optimizer_state(shards: Path, read: Callable[[Path, Sequence[str]], Any]) -> dict[str, Any]:
    """Read the state dict of AdamW that ``torch.distributed.checkpoint`` saved.

    Args:
        shards: the directory.
        read: ``dcp.read.read_values`` or ``dcp.read.locate_values``.

    Raises:
        TypeError: for the state of another optimizer.
    """
    return _checked(read(shards, OPTIMIZER_KEYS))


def _checked(state_dict: Any) -> dict[str, Any]:
    """Return the state dict of AdamW."""
    if isinstance(state_dict, dict) and "param_groups" in state_dict:
        # torch.distributed.checkpoint saves no empty dict, which the state is before the first step.
        state_dict.setdefault("state", {})
    state_dict = with_full_moments(state_dict)
    require_adamw_state_dict(state_dict)
    checked: dict[str, Any] = state_dict
    return checked
