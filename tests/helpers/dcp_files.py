"""Directories of torch.distributed.checkpoint in each of their layouts, and a pickle that must never run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict


def save_dcp(saved: dict[str, Any], path: Path) -> None:
    """Save over any older checkpoint, about which torch would warn otherwise."""
    (path / ".metadata").unlink(missing_ok=True)
    dcp.save(saved, checkpoint_id=path)


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}


def flattened(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer, options=options)}


def by_id(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


class App:
    """Application state as in torch's tutorial."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.saved = by_name(model, optimizer)

    def state_dict(self) -> dict[str, Any]:
        return self.saved

    def load_state_dict(self, saved: dict[str, Any]) -> None: ...


def in_app(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"app": App(model, optimizer), "epoch": 3}


DCP_LAYOUTS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], dict[str, Any]]] = {
    "dcp by name": by_name,
    "dcp flattened": flattened,
    "dcp by id": by_id,
    "dcp in app": in_app,
}


def rewrite_metadata(directory: Path, change: Callable[[Any], Any]) -> None:
    """Change the metadata as objects of torch's own classes."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    (directory / ".metadata").write_bytes(pickle.dumps(change(metadata) or metadata))


class MaliciousPickle:
    """An object whose unpickling creates a directory, which tests assert not to exist."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)
