"""AdamW state dicts of a checkpoint directory, from a file or from ``torch.distributed.checkpoint``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fx_influence.interop.checkpoints.adamw_format import require_adamw_state_dict
from fx_influence.interop.checkpoints.dcp.read import read_values
from fx_influence.interop.checkpoints.directory import (
    OPTIMIZER,
    OPTIMIZER_KEYS,
    OPTIMIZER_SUBDIRECTORY,
    find_dcp_directory,
    require_any_file,
)
from fx_influence.interop.checkpoints.torch_save import load_values


def read_optimizer_state_dict(path: Path) -> dict[str, Any]:
    """Read the optimizer's state dict, of ``torch.distributed.checkpoint`` if it saved one, else of a file.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: for damaged files and for more than tensors and plain values.
        TypeError: for the state of another optimizer.
    """
    shards = find_dcp_directory(path, OPTIMIZER_SUBDIRECTORY, OPTIMIZER_KEYS)
    if shards is not None:
        return read_dcp_optimizer_state(shards, read_values)
    remedy = "{'optim': ...} with torch.distributed.checkpoint.save, or pass optimizer=False for the policy alone"
    require_any_file(path, OPTIMIZER, f"save optimizer.state_dict() there, or {remedy}")
    file = next(path / file for file in OPTIMIZER if (path / file).is_file())
    state_dict: dict[str, Any] = load_values(file, str(file))
    require_adamw_state_dict(state_dict)
    return state_dict


def read_dcp_optimizer_state(shards: Path, read: Callable[[Path, Sequence[str]], Any]) -> dict[str, Any]:
    """Read the state dict of AdamW that ``torch.distributed.checkpoint`` saved.

    Args:
        shards: the directory.
        read: ``dcp.read.read_values`` or ``dcp.read.locate_values``.

    Raises:
        TypeError: for the state of another optimizer.
    """
    state_dict: dict[str, Any] = read(shards, OPTIMIZER_KEYS)
    if "param_groups" in state_dict:
        # torch saves no empty dict, which the state is before the first step.
        state_dict.setdefault("state", {})
    require_adamw_state_dict(state_dict)
    return state_dict
