"""AdamW's state from the files of all ranks: moments of DTensors, or of the flat parameters of FSDP1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fx_influence.interop.checkpoints.files.unpickle import LocalShard
from fx_influence.interop.checkpoints.fsdp.flat_parameters import FlatUnit, flat_units
from fx_influence.interop.checkpoints.fsdp.rank_files import RankValues, join, load_ranks, shard_coordinates

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def read_rank_optimizer(files: Sequence[Path], config: Path, model_files: Sequence[Path]) -> dict[str, Any]:
    """Read the optimizer's state dict, by integer id as saved, or by name where FSDP1 saved flat parameters.

    Args:
        files: of the optimizer, one a rank.
        config: directory of the model's ``config.json``, from which the contents of flat parameters follow.
        model_files: of the model, one a rank, which say how ranks divide flat parameters; may be empty.

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
        return _unflattened(saved, state, flat_units(config), coordinates)
    entries = {key: state.item(key) for key in state.values[0]}
    joined = {key: {field: join(entry.item(field)) for field in entry.values[0]} for key, entry in entries.items()}
    return {"param_groups": saved, "state": joined}


def _is_flat(state: RankValues) -> bool:
    """Return whether the moments are of flat parameters: plain tensors of one axis."""
    moments = [entry.get("exp_avg") for entry in state.values[0].values() if isinstance(entry, dict)]
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
    groups: list[dict[str, Any]], state: RankValues, units: list[FlatUnit], coordinates: list[int]
) -> dict[str, Any]:
    """Return the state dict by name of an optimizer over flat parameters."""
    ids = [key for group in groups for key in group["params"]]
    if len(groups) != 1 or len(ids) != len(units):
        raise ValueError(
            f"{state.files[0]} has {len(ids)} flat parameters in {len(groups)} groups; expected "
            f"{len(units)} in one, one for the root and one for each layer, as FSDP1 wraps by default. Train with "
            "actor.strategy=fsdp2, or without a wrap_policy and LoRA"
        )
    # Ranks that replicate each other have the same coordinate; the first one counts.
    ranks = [coordinates.index(place) for place in range(max(coordinates) + 1)]
    by_name: dict[str, dict[str, Any]] = {}
    for key, unit in zip(ids, units, strict=True):
        entry = state.item(key)
        step = join(entry.item("step"))
        moments = {field: _unit_values(entry.item(field), ranks, unit) for field in MOMENTS if field in entry.values[0]}
        for name in unit.shapes:
            by_name[name] = {"step": step, **{field: values[name] for field, values in moments.items()}}
    return {"param_groups": [{**groups[0], "params": list(by_name)}], "state": by_name}


def _unit_values(moment: RankValues, ranks: list[int], unit: FlatUnit) -> dict[str, Tensor]:
    """Return one moment of each parameter of a unit."""
    shares = [moment.values[rank] for rank in ranks]
    share = -(-unit.numel // len(ranks))
    sizes = [tuple(local.shape) if isinstance(local, Tensor) else type(local).__name__ for local in shares]
    if sizes != [(share,)] * len(ranks):
        raise ValueError(
            f"{moment.name.rstrip('.')} of the flat parameter of {unit.name} has the sizes {sizes} in "
            f"{moment.files[0].parent}; expected {share} on each rank, of {unit.numel} in all. Train with "
            "actor.strategy=fsdp2, or without a wrap_policy, use_orig_params and LoRA"
        )
    flat = torch.cat(shares)[: unit.numel]
    pieces = flat.split([shape.numel() for shape in unit.shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(unit.shapes.items(), pieces, strict=True)}
