"""AdamW's state from the files of all ranks: moments of DTensors, or of the flat parameters of FSDP1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fx_influence.interop.checkpoints.files.unpickle import LocalShard
from fx_influence.interop.checkpoints.fsdp.flat_parameters import FlatUnit, flat_units, meta_model
from fx_influence.interop.checkpoints.fsdp.lora import rank_adapter
from fx_influence.interop.checkpoints.fsdp.rank_files import RankValues, join, load_ranks, shard_coordinates

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def read_rank_optimizer(files: Sequence[Path], config: Path, model_files: Sequence[Path]) -> dict[str, Any]:
    """Read the optimizer's state dict, by integer id as saved, or by name where FSDP1 saved flat parameters.

    Args:
        files: of the optimizer, one a rank.
        config: directory of the model's ``config.json``, from which the contents of flat parameters follow.
        model_files: of the model, one a rank, which say how ranks divide flat parameters, and whether there is an
            adapter; may be empty.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: naming the file, for a damaged one and for shards that do not fit.
    """
    ranks = load_ranks(files)
    groups, state = ranks.item("param_groups"), ranks.item("state")
    for file, value in zip(groups.files, groups.values, strict=True):
        if value != groups.values[0]:
            raise ValueError(
                f"param_groups in {file} differ from those in {files[0]}; expected the same. Take the files of all "
                "ranks from one save"
            )
    saved = groups.values[0]
    if _is_flat(state):
        coordinates = _coordinates(model_files, len(files))
        adapter = rank_adapter(model_files)
        model = meta_model(config, None if adapter is None else adapter.config)
        return _unflattened(saved, state, model, coordinates)
    entries = {key: state.item(key) for key in state.values[0]}
    joined = {key: {field: join(entry.item(field)) for field in entry.values[0]} for key, entry in entries.items()}
    return {"param_groups": saved, "state": joined}


def _is_flat(state: RankValues) -> bool:
    """Return whether the moments are of flat parameters, or of parts of them: plain tensors of one axis."""
    entries = [entry for values in state.values if isinstance(values, dict) for entry in values.values()]
    moments = [entry.get("exp_avg") for entry in entries if isinstance(entry, dict)]
    return bool(moments) and all(isinstance(moment, Tensor) and moment.ndim == 1 for moment in moments)


def _coordinates(model_files: Sequence[Path], world_size: int) -> list[int]:
    """Return which share of flat parameters each rank has: the same as of the weights."""
    if len(model_files) == world_size:
        ranks = load_ranks(model_files)
        for name, value in ranks.values[0].items():
            if isinstance(value, LocalShard) and value.axis is not None:
                return shard_coordinates(ranks.item(name))
    return list(range(world_size))


def _unflattened(
    groups: list[dict[str, Any]], state: RankValues, model: nn.Module, coordinates: list[int]
) -> dict[str, Any]:
    """Return the state dict by name of an optimizer over flat parameters, or over the original ones within them."""
    ids = [key for group in groups for key in group["params"]]
    units = flat_units(model)
    originals = [FlatUnit(name, {name: parameter.shape}, False) for name, parameter in model.named_parameters()]
    if len(groups) != 1 or len(ids) not in (len(units), len(originals)):
        raise ValueError(
            f"{state.files[0]} has {len(ids)} flat parameters in {len(groups)} groups; expected {len(units)} in one, "
            f"one for the root, each layer and each matrix of LoRA, as FSDP1 wraps by default, or {len(originals)} "
            "with use_orig_params. Train with actor.strategy=fsdp2, or without a wrap_policy"
        )
    by_name: dict[str, dict[str, Any]] = {}
    is_flat = len(ids) == len(units)
    for key, unit in zip(ids, units if is_flat else originals, strict=True):
        # Frozen units have no state, nor has a rank that has no part of an original parameter.
        owners = [rank for rank, values in enumerate(state.values) if key in values]
        if owners:
            entry = (state if is_flat else state.of_ranks(owners)).item(key)
            by_name |= _unit_state(entry, coordinates if is_flat else [coordinates[rank] for rank in owners], unit)
    names = [name for unit in units for name in unit.shapes]
    return {"param_groups": [{**groups[0], "params": names}], "state": by_name}


def _unit_state(entry: RankValues, coordinates: list[int], unit: FlatUnit) -> dict[str, dict[str, Any]]:
    """Return the state of each parameter of a unit, from the ranks' shares of the unit's."""
    step = join(entry.item("step"))
    moments = {
        field: _unit_values(entry.item(field), coordinates, unit) for field in MOMENTS if field in entry.values[0]
    }
    return {name: {"step": step, **{field: values[name] for field, values in moments.items()}} for name in unit.shapes}


def _unit_values(moment: RankValues, coordinates: list[int], unit: FlatUnit) -> dict[str, Tensor]:
    """Return one moment of each parameter of a unit."""
    # Ranks that replicate each other have the same coordinate; the first one counts.
    shares = [moment.values[coordinates.index(place)] for place in sorted(set(coordinates))]
    lengths = [value.numel() if isinstance(value, Tensor) and value.ndim == 1 else -1 for value in shares]
    share = -(-unit.numel // len(shares))
    expected = f"{share} on each rank, of {unit.numel} in all" if unit.padded else f"{unit.numel} in all"
    fits = lengths == [share] * len(shares) if unit.padded else sum(lengths) == unit.numel
    if min(lengths) < 0 or not fits:
        raise ValueError(
            f"{moment.name.rstrip('.')}, of {unit.name}, has the lengths {lengths} on the ranks of "
            f"{moment.files[0].parent}; expected {expected}. Take the files of all ranks from one save; or train with "
            "actor.strategy=fsdp2, or without a wrap_policy"
        )
    flat = torch.cat(shares)[: unit.numel]
    pieces = flat.split([shape.numel() for shape in unit.shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(unit.shapes.items(), pieces, strict=True)}
