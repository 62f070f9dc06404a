"""Recognition of checkpoint directories: where a trainer put config, tokenizer, weights and optimizer state.

Source, beside the readers': PrimeIntellect-ai/prime-rl, src/prime_rl/trainer/ckpt.py at commit 559b447; NVIDIA-NeMo/RL,
nemo_rl/utils/checkpoint.py and native_checkpoint.py at 7ea279a; pytorch/torchtitan,
torchtitan/components/checkpointer/dcp.py at b5bcd76; accelerate 1.15, accelerate/utils/fsdp_utils.py.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fx_influence.interop.checkpoints.dcp.read import has_top_level_tensors, read_top_level_tensors, read_values
from fx_influence.interop.checkpoints.deepspeed.files import zero_directory
from fx_influence.interop.checkpoints.deepspeed.read import read_zero_optimizer, read_zero_weights
from fx_influence.interop.checkpoints.files.directory import (
    ADAPTER_WEIGHTS,
    MODEL_KEYS,
    MODEL_SUBDIRECTORIES,
    OPTIMIZER,
    OPTIMIZER_KEYS,
    OPTIMIZER_SUBDIRECTORIES,
    TOKENIZER,
    WEIGHTS,
    find_dcp_directory,
)
from fx_influence.interop.checkpoints.files.foreign import refuse_foreign
from fx_influence.interop.checkpoints.files.torch_save import load_values
from fx_influence.interop.checkpoints.fsdp.lora import RankAdapter, rank_adapter
from fx_influence.interop.checkpoints.fsdp.optimizer import read_rank_optimizer
from fx_influence.interop.checkpoints.fsdp.rank_files import rank_files, read_rank_weights

FULL_WEIGHTS = "pytorch_model_fsdp.bin"
"""Name of accelerate's file of the weights that FSDP gathered (``FULL_STATE_DICT``)."""

_STEP = re.compile(r"(?:checkpoint-|global_step_|step_|step-)(\d+)")
_BELOW = ("actor", "policy", "trainer", "checkpoints", "checkpoint", "_actor")
"""Subdirectories of the policy's training state: of verl, SkyRL and NeMo-RL, prime-rl, torchtitan, OpenRLHF."""


class SavedWeights(NamedTuple):
    """Weights that are in other files than transformers'.

    Attributes:
        path: their place.
        read: function that reads them by name.
        adapter: function that returns the adapter that is trained in them; None without one.
    """

    path: Path
    read: Callable[[], dict[str, Any]]
    adapter: Callable[[], RankAdapter | None] = lambda: None


class Layout(NamedTuple):
    """The parts of a checkpoint.

    Attributes:
        path: directory of the training state.
        config: directory of ``config.json``, and of transformers' weights.
        tokenizer: directory of the tokenizer.
        weights: None for files of transformers or peft.
        read_optimizer: function of the directory of ``config.json`` that reads the optimizer's state dict; None
            without one.
    """

    path: Path
    config: Path
    tokenizer: Path
    weights: SavedWeights | None
    read_optimizer: Callable[[Path], dict[str, Any]] | None


def find_layout(path: Path, optimizer: bool) -> Layout:
    """Recognise a checkpoint directory.

    Args:
        path: the directory of a checkpoint, or one above it, such as the trainer's ``output_dir``.
        optimizer: whether the optimizer's state is needed too.

    Raises:
        FileNotFoundError: naming the files of ranks that are missing.
        ValueError: for a format that is known by name and is not read, with the conversion to make.

    Warns:
        UserWarning: naming the checkpoint that is read, where ``path`` has several and the last one is taken.
    """
    directory = _training_state(path, optimizer)
    layout = _layout(directory)
    if not _has_weights(layout):
        refuse_foreign(directory)
    return layout


def _training_state(path: Path, optimizer: bool) -> Path:
    """Return the directory of the training state, ``path`` or one below it."""
    layout = _layout(path)
    has_weights = _has_weights(layout)
    if has_weights and (layout.read_optimizer is not None or not optimizer):
        return path
    steps = sorted(
        (int(m[1]), entry) for entry in path.iterdir() if entry.is_dir() and (m := _STEP.fullmatch(entry.name))
    )
    if steps:
        if len(steps) > 1 or has_weights:
            warnings.warn(
                f"{path} holds {', '.join(entry.name for _, entry in steps)}; reading {steps[-1][1].name}, weights and "
                "optimizer state. Pass its directory to choose another",
                stacklevel=4,
            )
        return _training_state(steps[-1][1], optimizer)
    below = next((path / name for name in _BELOW if (path / name).is_dir()), None)
    return path if below is None or has_weights else _training_state(below, optimizer)


def _layout(path: Path) -> Layout:
    """Return the parts of the checkpoint that is in ``path`` itself."""
    config = _first_with(
        path, ("", "huggingface", "weights", "weights/model", "weights/model/consolidated"), ("config.json",)
    )
    tokenizer = _first_with(path, ("", "huggingface", "tokenizer"), TOKENIZER)
    return Layout(path, config, tokenizer, _saved_weights(path), _optimizer_reader(path))


def _saved_weights(path: Path) -> SavedWeights | None:
    """Return the weights of a directory, None for those of transformers or peft."""
    if files := rank_files(path, "model"):
        return SavedWeights(path, partial(read_rank_weights, files), partial(rank_adapter, files))
    if zero := zero_directory(path):
        return SavedWeights(zero, partial(read_zero_weights, zero))
    if shards := find_dcp_directory(path, MODEL_SUBDIRECTORIES, MODEL_KEYS):
        return SavedWeights(shards, partial(read_values, shards, MODEL_KEYS))
    if has_top_level_tensors(path):
        return SavedWeights(path, partial(read_top_level_tensors, path))
    file = path / FULL_WEIGHTS
    return SavedWeights(file, partial(load_values, file, str(file))) if file.is_file() else None


def _optimizer_reader(path: Path) -> Callable[[Path], dict[str, Any]] | None:
    """Return a function of the config's directory that reads the optimizer's state dict, None without one."""
    if files := rank_files(path, "optim"):
        models = rank_files(path, "model")
        return lambda config: read_rank_optimizer(files, config, models)
    if zero := zero_directory(path):
        return lambda _: read_zero_optimizer(zero)
    if shards := find_dcp_directory(path, OPTIMIZER_SUBDIRECTORIES, OPTIMIZER_KEYS):
        return lambda _: read_values(shards, OPTIMIZER_KEYS)
    file = next((path / name for name in OPTIMIZER if (path / name).is_file()), None)
    return None if file is None else lambda _: load_values(file, str(file))


def _has_weights(layout: Layout) -> bool:
    return layout.weights is not None or _has_any(layout.config, WEIGHTS) or _has_any(layout.path, ADAPTER_WEIGHTS)


def _first_with(path: Path, subdirectories: Sequence[str], names: Sequence[str]) -> Path:
    """Return the first of some subdirectories that has any of some files; ``path`` if none has."""
    return next((path / name for name in subdirectories if _has_any(path / name, names)), path)


def _has_any(path: Path, names: Sequence[str]) -> bool:
    return any((path / name).is_file() for name in names)
