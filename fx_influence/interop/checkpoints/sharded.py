"""Saved training states read into a model that FSDP2 has sharded, of which every rank reads only its shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fx_influence.core.dtensor import to_local
from fx_influence.distributed.fsdp_gather import local_slices
from fx_influence.interop.checkpoints.dcp.read import StoredValue, locate_values, read_slice
from fx_influence.interop.checkpoints.files.directory import (
    MODEL_KEYS,
    MODEL_SUBDIRECTORIES,
    OPTIMIZER_KEYS,
    OPTIMIZER_SUBDIRECTORIES,
    find_dcp_directory,
    read_param_names,
    require_directory,
)
from fx_influence.interop.checkpoints.optimizer_state import restore_optimizer
from fx_influence.interop.checkpoints.saved_optimizer import read_dcp_optimizer_state
from fx_influence.interop.optimizers import on_all_ranks


def load_sharded_checkpoint(
    path: str | Path,
    model: nn.Module,
    *,
    optimizer: bool = True,
    param_names: Sequence[Sequence[str]] | None = None,
) -> torch.optim.AdamW | None:
    """Fill the weights of ``model`` from a checkpoint and return its AdamW; no rank ever holds a complete tensor.

    Every rank makes the call and reads the rows that its shards need. What is raised on one rank is raised on all;
    weights are changed only after every check except the one for damaged data. Moments are cast to the parameters'
    dtype, as torch does. If an adapter was saved alone, the base model's weights stay. Nothing but tensors and plain
    values is unpickled.

    Args:
        path: directory in which ``torch.distributed.checkpoint`` saved the model under ``model`` and the optimizer
            under ``optim`` or ``optimizer``, or where accelerate and ``Trainer`` put them, see ``load_checkpoint``;
            saved by any number of processes.
        model: the model after ``fully_shard`` (an unsharded one also works), on its device: after ``to_empty`` if it
            was made on the meta device, which leaves buffers that are not saved to the caller.
        optimizer: False returns None in place of the optimizer.
        param_names: see ``load_checkpoint``.

    Returns:
        A ``torch.optim.AdamW`` over the model's parameters with this rank's shards of the state, or None.

    Raises:
        FileNotFoundError: for missing files.
        ValueError: for files that are damaged or do not fit the model, with names and shapes.
        TypeError: for the state of another optimizer.

    Example:
        >>> import tempfile, warnings
        >>> from torch.distributed import checkpoint as dcp
        >>> model = nn.Linear(2, 1)
        >>> saved = {"model": {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}}
        >>> with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # that this is a single process
        ...     _ = dcp.save(saved, checkpoint_id=directory)
        ...     load_sharded_checkpoint(directory, model, optimizer=False)
        >>> model.weight.tolist()
        [[1.0, 1.0]]
    """
    return on_all_ranks(
        model.parameters(), lambda: _load(require_directory("path", path), model, optimizer, param_names)
    )


def _load(
    path: Path, model: nn.Module, optimizer: bool, param_names: Sequence[Sequence[str]] | None
) -> torch.optim.AdamW | None:
    state_dict = None
    if optimizer:
        state_dict = read_dcp_optimizer_state(
            _require_dcp(path, OPTIMIZER_SUBDIRECTORIES, OPTIMIZER_KEYS), locate_values
        )
    for stored, value in _match_values(model, _require_dcp(path, MODEL_SUBDIRECTORIES, MODEL_KEYS)):
        if isinstance(stored, StoredValue):
            read_slice(stored, [index.start for index in local_slices(value)], to_local(value))
        else:
            value.copy_(stored)
    if state_dict is None:
        return None
    return restore_optimizer(state_dict, model, read_param_names(path) if param_names is None else param_names)


def _require_dcp(path: Path, subdirectories: Sequence[str], names: Sequence[str]) -> Path:
    """Return the directory that holds a value under one of ``names``; raise ``FileNotFoundError`` if none does."""
    directory = find_dcp_directory(path, subdirectories, names)
    if directory is None:
        raise FileNotFoundError(
            f"neither {path} nor {path / subdirectories[0]} is of torch.distributed.checkpoint; expected one with the "
            f"key {' or '.join(names)}. Save {{'model': ..., 'optim': ...}} there by torch.distributed.checkpoint.save"
        )
    return directory


def _match_values(model: nn.Module, shards: Path) -> list[tuple[StoredValue | Tensor, Tensor]]:
    """Return the saved value of each parameter and buffer of the model, tied ones once, and the tensor to fill."""
    saved = locate_values(shards, MODEL_KEYS)
    names: dict[Tensor, list[str]] = {}
    for name, value in _values(model):
        names.setdefault(value, []).append(name)
    keys = {
        value: [key for name in tied for key in _aliases(name, model) if key in saved] for value, tied in names.items()
    }
    # An adapter may be saved without its base model.
    adapter_only = any(p.requires_grad for p in names) and not any(
        keys[value] for value in names if not value.requires_grad
    )
    misfits = []
    for value, tied in names.items():
        saved_shape = saved[keys[value][0]].shape if keys[value] else None
        if value.is_meta:
            misfits.append(f"{tied[0]} is on the meta device, which has no memory to read into")
        elif saved_shape is None and (value.requires_grad or not adapter_only):
            misfits.append(f"{tied[0]} of shape {tuple(value.shape)} is missing")
        elif saved_shape is not None and tuple(saved_shape) != tuple(value.shape):
            misfits.append(f"{tied[0]} has shape {tuple(saved_shape)} there and {tuple(value.shape)} in the model")
    if misfits:
        raise ValueError(
            f"the weights in {shards} do not fit the model: {'; '.join(misfits[:5])} ({len(misfits)} in all); "
            "expected weights of its names and shapes. Pass the model that was saved, sharded by fully_shard, on "
            "its device"
        )
    return [(saved[key[0]], value.detach()) for value, key in keys.items() if key]


def _values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of all parameters and saved buffers, tied ones under each name."""
    yield from model.named_parameters(remove_duplicate=False)
    for owner, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield f"{owner}.{leaf}".lstrip("."), buffer


def _aliases(name: str, model: nn.Module) -> list[str]:
    """Return the name, and the names under which peft saves it."""
    adapters = getattr(model, "peft_config", {})
    short = (name.replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", ".") for adapter in adapters)
    return [name, *(other for other in short if other != name)]
