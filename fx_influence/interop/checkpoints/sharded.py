"""A saved training state read into a model that FSDP2 has sharded, every rank's own shards and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fx_influence.core.dtensor import to_local
from fx_influence.distributed.fsdp_gather import local_slices
from fx_influence.interop.checkpoints.dcp.read import StoredValue, locate_values, read_slice
from fx_influence.interop.checkpoints.directory import (
    MODEL_KEYS,
    MODEL_SUBDIRECTORY,
    OPTIMIZER_KEYS,
    OPTIMIZER_SUBDIRECTORY,
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
    """Fill the weights of ``model`` with those of a checkpoint, and give its AdamW; no rank ever holds a whole tensor.

    ``path``: where ``torch.distributed.checkpoint`` saved the model under ``model`` and the optimizer under ``optim``
    or ``optimizer``, in ``path`` or where accelerate and ``Trainer`` put them, see ``load_checkpoint``; by any number
    of processes. Every rank reads the rows that its own shards need. ``model``: after ``fully_shard`` (one that is not
    sharded will do), on its device: after ``to_empty`` where it was made on the meta device, which leaves buffers that
    are not saved to the caller. Of an adapter saved alone, the base's weights stay. ``optimizer``: False gives None.
    ``param_names``: see ``load_checkpoint``. Moments are cast to the parameters' dtype, as torch does.

    Every rank makes the call, and what is raised on one is raised on all: ``FileNotFoundError`` for what is missing,
    ``ValueError`` for files that are damaged or do not fit the model, with names and shapes, and ``TypeError`` for the
    state of another optimizer; weights are changed only after all but damage has been looked for. Nothing but tensors
    and plain values is unpickled.

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
    return on_all_ranks(model, lambda: _load(require_directory("path", path), model, optimizer, param_names))


def _load(
    path: Path, model: nn.Module, optimizer: bool, param_names: Sequence[Sequence[str]] | None
) -> torch.optim.AdamW | None:
    state_dict = None
    if optimizer:
        state_dict = read_dcp_optimizer_state(_shards(path, OPTIMIZER_SUBDIRECTORY, OPTIMIZER_KEYS), locate_values)
    for stored, value in _wanted(model, _shards(path, MODEL_SUBDIRECTORY, MODEL_KEYS)):
        if isinstance(stored, StoredValue):
            read_slice(stored, [where.start for where in local_slices(value)], to_local(value))
        else:
            value.copy_(stored)
    if state_dict is None:
        return None
    return restore_optimizer(state_dict, model, read_param_names(path) if param_names is None else param_names)


def _shards(path: Path, subdirectory: str, part: Sequence[str]) -> Path:
    found = find_dcp_directory(path, subdirectory, part)
    if found is None:
        raise FileNotFoundError(
            f"neither {path} nor {path / subdirectory} is of torch.distributed.checkpoint with the key "
            f"{' or '.join(part)}; save {{'model': ..., 'optim': ...}} there with torch.distributed.checkpoint.save"
        )
    return found


def _wanted(model: nn.Module, shards: Path) -> list[tuple[StoredValue | Tensor, Tensor]]:
    """What is saved of each parameter and buffer of the model, tied ones once, and the tensor that it is for."""
    saved = locate_values(shards, MODEL_KEYS)
    names: dict[Tensor, list[str]] = {}
    for name, value in _values(model):
        names.setdefault(value, []).append(name)
    keys = {
        value: [key for name in own for key in _aliases(name, model) if key in saved] for value, own in names.items()
    }
    # An adapter may be saved alone.
    alone = any(p.requires_grad for p in names) and not any(keys[value] for value in names if not value.requires_grad)
    misfits = []
    for value, own in names.items():
        there = saved[keys[value][0]].shape if keys[value] else None
        if value.is_meta:
            misfits.append(f"{own[0]} is on the meta device, where nothing can be read to")
        elif there is None and (value.requires_grad or not alone):
            misfits.append(f"{own[0]} of shape {tuple(value.shape)} is missing")
        elif there is not None and tuple(there) != tuple(value.shape):
            misfits.append(f"{own[0]} has shape {tuple(there)} there and {tuple(value.shape)} in the model")
    if misfits:
        raise ValueError(
            f"the weights in {shards} do not fit the model: {'; '.join(misfits[:5])} ({len(misfits)} in all); pass the "
            "model that was saved, sharded by fully_shard, on its device"
        )
    return [(saved[key[0]], value.detach()) for value, key in keys.items() if key]


def _values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    for owner, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield f"{owner}.{leaf}".lstrip("."), buffer


def _aliases(name: str, model: nn.Module) -> list[str]:
    """The name, and what peft makes of it."""
    adapters = getattr(model, "peft_config", {})
    short = (name.replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", ".") for adapter in adapters)
    return [name, *(other for other in short if other != name)]
