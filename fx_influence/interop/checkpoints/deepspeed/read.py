"""Weights and AdamW's state of a DeepSpeed checkpoint of ZeRO-1, 2 or 3, by name.

The weights are the float32 masters that the optimizer steps. What DeepSpeed pickled beside tensors (loss scaler,
configuration, the trainer's own) is never built. Source: deepspeedai/DeepSpeed, deepspeed/runtime/engine.py,
deepspeed/runtime/zero/stage_1_and_2.py, stage3.py and deepspeed/runtime/bf16_optimizer.py at commit edaa722
(``state_dict``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fx_influence.interop.checkpoints.deepspeed.files import model_files, optimizer_files
from fx_influence.interop.checkpoints.deepspeed.partitions import Shapes, join_shares, join_vector
from fx_influence.interop.checkpoints.files.unpickle import load_inert

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

Join = Callable[[list[Tensor], Shapes, str], dict[str, Tensor]]


def read_zero_weights(directory: Path) -> dict[str, Tensor]:
    """Read the weights: trained ones in float32, frozen ones and buffers as saved, tied ones under each name.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: naming the file, for a damaged one and for partitions that do not fit.
    """
    files = model_files(directory)
    models = [_require(load_inert(file), ("param_shapes", "buffer_names"), file) for file in files]
    ranks = _load_optimizers(directory)
    stage = _stage(ranks[0])
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    join: Join = join_shares if stage == 3 else join_vector
    module, shapes = models[0]["module"], models[0]["param_shapes"]
    weights: dict[str, Tensor] = {}
    if isinstance(module, dict):
        # Frozen parameters and buffers; below ZeRO-3 also the trained ones in low precision, replaced below.
        weights = {
            name: value
            for name, value in module.items()
            if isinstance(value, Tensor) and (stage != 3 or name in models[0]["buffer_names"])
        }
    if stage == 3:
        frozen = models[0].get("frozen_param_shapes") or {}
        for name, shape in frozen.items():
            shares = [model["frozen_param_fragments"][name] for model in models]
            weights |= join_shares(shares, {name: shape}, f"the frozen {name} in {directory}")
    else:
        weights |= models[0].get("frozen_param_fragments") or {}
    groups = [rank[key] for rank in ranks]
    if {len(group) for group in groups} != {len(shapes)}:
        raise ValueError(
            f"{directory} has {[len(group) for group in groups]} groups of weights; expected {len(shapes)} on each "
            "rank, as param_shapes says. Take the files of all ranks from one save"
        )
    for index, group_shapes in enumerate(shapes):
        subject = f"group {index} of the weights in {directory}"
        weights |= join([group[index] for group in groups], group_shapes, subject)
    tied = models[0].get("shared_params") or {}
    return weights | {name: weights[source] for name, source in tied.items() if source in weights}


def read_zero_optimizer(directory: Path) -> dict[str, Any]:
    """Read the optimizer's state dict with names in place of ids.

    Raises:
        FileNotFoundError: for a missing file.
        TypeError: for Adam whose weight decay is part of the gradient.
        ValueError: naming the file, for a damaged one, for partitions that do not fit, and without moments.
    """
    ranks = _load_optimizers(directory)
    file = model_files(directory)[0]
    shapes = _require(load_inert(file), ("param_shapes",), file)["param_shapes"]
    stage = _stage(ranks[0])
    key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    saved = [rank[key] for rank in ranks]
    if not all(isinstance(value, dict) and {"state", "param_groups"} <= set(value) for value in saved):
        raise ValueError(
            f"{key} in {directory} is not a state dict, as with elastic checkpoints or states on NVMe; expected "
            "'state' and 'param_groups'. Save with elastic_checkpoint=false and without NVMe offload"
        )
    groups = saved[0]["param_groups"]
    ids = [index for group in groups for index in group["params"]]
    if len(ids) != len(shapes):
        raise ValueError(
            f"the optimizer in {directory} has {len(ids)} flat parameters; expected {len(shapes)}, as param_shapes "
            "says. Take the files of all ranks from one save"
        )
    by_id = dict(zip(ids, shapes, strict=True))
    join: Join = join_shares if stage == 3 else join_vector
    state: dict[str, dict[str, Any]] = {}
    for group in groups:
        for index in group["params"]:
            entries = [value["state"].get(index, {}) for value in saved]
            state |= _by_name(entries, by_id[index], group, join, f"{directory}, parameter group {index}")
    return {"param_groups": [_named_group(group, by_id) for group in groups], "state": state}


def _by_name(
    entries: list[dict[str, Any]], shapes: Shapes, group: dict[str, Any], join: Join, subject: str
) -> dict[str, dict[str, Any]]:
    """Return the state of each parameter of a flat one."""
    if not any(entries):
        return {}
    # Optimizers of DeepSpeed and of apex count the steps of a group, others those of a parameter.
    steps = {float(entry.get("step", group.get("step", -1))) for entry in entries}
    if len(steps) > 1 or -1.0 in steps:
        raise ValueError(
            f"{subject} has the steps {sorted(steps)}; expected one, the same on all ranks. Take the files of all "
            "ranks from one save"
        )
    unknown = {field for entry in entries for field in entry} - {"step", *MOMENTS}
    moments = {
        field: join([_tensor(entry, field, subject) for entry in entries], shapes, f"{field} in {subject}")
        for field in MOMENTS
        if any(field in entry for entry in entries)
    }
    # Fields of other optimizers stay, so that these are refused by name.
    others = {field: entries[0].get(field) for field in unknown}
    step = torch.tensor(steps.pop())
    return {
        name: {"step": step, **{field: values[name] for field, values in moments.items()}, **others} for name in shapes
    }


def _tensor(entry: dict[str, Any], field: str, subject: str) -> Tensor:
    value = entry.get(field)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{field} in {subject} is a {type(value).__name__} on one rank; expected a tensor. Take the files of all "
            "ranks from one save"
        )
    return value


def _named_group(group: dict[str, Any], by_id: dict[int, Shapes]) -> dict[str, Any]:
    """Return the group with names, and with the fields of torch's AdamW that DeepSpeed's optimizers leave out."""
    fields = {field: value for field, value in group.items() if field not in ("step", "bias_correction")}
    if not group.get("bias_correction", True):
        raise TypeError(
            "param_groups of DeepSpeed's Adam have bias_correction=False; expected AdamW with bias correction. Its "
            "steps are others than those that are attributed"
        )
    return {"amsgrad": False, **fields, "params": [name for index in group["params"] for name in by_id[index]]}


def _load_optimizers(directory: Path) -> list[dict[str, Any]]:
    """Return the optimizer's part of each rank's file."""
    files = optimizer_files(directory)
    loaded = [_require(load_inert(file), ("optimizer_state_dict",), file) for file in files]
    for file, value in zip(files, loaded, strict=True):
        _require_decoupled(file, value.get("ds_config"))
    ranks = [value["optimizer_state_dict"] for value in loaded]
    for file, rank in zip(files, ranks, strict=True):
        count = rank.get("partition_count")
        counts = count if isinstance(count, (list, tuple)) else [count]
        if any(number != len(files) for number in counts):
            raise ValueError(
                f"partition_count in {file} is {count}; expected {len(files)}, the number of files of ranks in "
                f"{directory}. Copy the files of all ranks, of one save"
            )
    return ranks


def _stage(rank: dict[str, Any]) -> int:
    """Return the stage of ZeRO; BF16_Optimizer, which names none, divides as ZeRO-1."""
    return int(rank.get("zero_stage", 1))


def _require_decoupled(file: Path, config: Any) -> None:
    """Raise ``TypeError`` for DeepSpeed's Adam with an L2 penalty, which its groups do not show."""
    optimizer = config.get("optimizer") if isinstance(config, dict) else None
    parameters = (optimizer or {}).get("params") or {}
    coupled = str((optimizer or {}).get("type", "")).lower() == "adam" and parameters.get("adam_w_mode") is False
    if coupled and float(parameters.get("weight_decay", 0.0)):
        raise TypeError(
            f"{file} is of DeepSpeed's Adam with adam_w_mode=false; expected AdamW, or weight_decay 0. Its weight "
            "decay is part of the gradient"
        )


def _require(value: Any, fields: tuple[str, ...], file: Path) -> dict[str, Any]:
    """Return a dict that has some fields."""
    missing = [field for field in fields if not isinstance(value, dict) or value.get(field) is None]
    if missing:
        raise ValueError(
            f"{file} has no {missing}; expected them, as DeepSpeed's ZeRO saves. Save with engine.save_checkpoint"
        )
    checked: dict[str, Any] = value
    return checked
