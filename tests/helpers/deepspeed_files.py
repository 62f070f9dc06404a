"""DeepSpeed checkpoints rebuilt after its source, since DeepSpeed itself is not needed to read them.

The classes that DeepSpeed pickles are made here under its module names, which exist only while a file is written.
Source: deepspeedai/DeepSpeed, deepspeed/runtime/engine.py (``_common_checkpoint_state``, ``_save_zero_checkpoint``),
deepspeed/runtime/zero/stage_1_and_2.py and stage3.py (``state_dict``) at commit edaa722.
"""

from __future__ import annotations

import enum
import math
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def deepspeed_classes() -> Iterator[tuple[Any, Any]]:
    """Yield stand-ins for ``LossScaler`` and ``ZeroStageEnum`` that pickle under DeepSpeed's names."""

    class LossScaler:
        def __init__(self) -> None:
            self.cur_scale = 1.0

    class ZeroStageEnum(int, enum.Enum):
        optimizer_states = 1
        gradients = 2
        weights = 3

    places = {"deepspeed.runtime.fp16.loss_scaler": LossScaler, "deepspeed.runtime.zero.config": ZeroStageEnum}
    modules: dict[str, types.ModuleType] = {}
    for module, kind in places.items():
        kind.__module__, kind.__qualname__ = module, kind.__name__
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        setattr(modules[module], kind.__name__, kind)
    sys.modules.update(modules)
    try:
        yield LossScaler(), ZeroStageEnum
    finally:
        for module in modules:
            sys.modules.pop(module, None)


def split_vector(tensors: Sequence[Tensor], ranks: int) -> list[Tensor]:
    """Return each rank's partition of tensors laid behind each other, element by element and padded with -7."""
    elements = [value for tensor in tensors for value in tensor.flatten().tolist()]
    size = math.ceil(len(elements) / (2 * ranks)) * 2
    elements += [-7.0] * (size * ranks - len(elements))
    return [torch.tensor(elements[size * rank : size * (rank + 1)]) for rank in range(ranks)]


def split_shares(tensors: Sequence[Tensor], ranks: int) -> list[Tensor]:
    """Return each rank's shares of every tensor, behind each other, each tensor padded with -7."""
    by_rank: list[list[float]] = [[] for _ in range(ranks)]
    for tensor in tensors:
        elements = tensor.flatten().tolist()
        size = math.ceil(len(elements) / ranks)
        for rank in range(ranks):
            share = elements[size * rank : size * (rank + 1)]
            by_rank[rank] += share + [-7.0] * (size - len(share))
    return [torch.tensor(share) for share in by_rank]


def write_zero(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    stage: int,
    ranks: int,
    *,
    fused: bool = False,
    sub_group: int = 10**9,
    frozen: Sequence[str] = (),
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint as ZeRO of a stage would on some ranks.

    Args:
        path: where ``global_step2`` is made.
        model: the model, in float32, whose weights are the masters.
        optimizer: its AdamW.
        stage: 1, 2 or 3.
        ranks: number of data-parallel ranks.
        fused: whether the optimizer is DeepSpeed's FusedAdam, which has no ``amsgrad`` and counts a group's steps.
        sub_group: of ZeRO-3, its largest number of elements but for a single larger parameter.
        frozen: names of parameters that are not trained.
        config: ``ds_config``; None for an empty one.
    """
    directory = path / "global_step2"
    directory.mkdir(parents=True)
    (path / "latest").write_text("global_step2")
    names = {parameter: name for name, parameter in model.named_parameters()}
    flat: list[tuple[int, list[nn.Parameter]]] = []
    for index, group in enumerate(optimizer.param_groups):
        part: list[nn.Parameter] = []
        for parameter in group["params"]:
            if stage == 3 and part and sum(p.numel() for p in part) + parameter.numel() > sub_group:
                flat.append((index, part))
                part = []
            part.append(parameter)
        flat.append((index, part))
    split = split_shares if stage == 3 else split_vector
    masters = [split([p.detach() for p in part], ranks) for _, part in flat]
    moments = {
        key: [split([optimizer.state[p][key] for p in part], ranks) for _, part in flat]
        for key in ("exp_avg", "exp_avg_sq")
    }
    step = int(optimizer.state[flat[0][1][0]]["step"])
    with deepspeed_classes() as (scaler, stages):
        for rank in range(ranks):
            state = {
                i: {key: moments[key][i][rank] for key in moments}
                | ({} if fused else {"step": torch.tensor(float(step))})
                for i in range(len(flat))
            }
            groups = []
            for index, group in enumerate(optimizer.param_groups):
                fields = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
                fields |= {"bias_correction": True, "step": step} if fused else {"amsgrad": False, "maximize": False}
                groups.append({**fields, "params": [i for i, (owner, _) in enumerate(flat) if owner == index]})
            base = {"state": state, "param_groups": groups}
            saved: dict[str, Any] = {"loss_scaler": scaler, "dynamic_loss_scale": False, "overflow": False}
            saved |= {"zero_stage": stages(stage), "partition_count": ranks if stage == 3 else [ranks] * len(flat)}
            if stage == 3:
                saved |= {"optimizer_state_dict": base, "fp32_flat_groups": [parts[rank] for parts in masters]}
            else:
                lean = [_without_padding(parts, part, rank) for parts, (_, part) in zip(masters, flat, strict=True)]
                saved |= {"base_optimizer_state": base, "single_partition_of_fp32_groups": lean}
            file = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save(
                {"optimizer_state_dict": saved, "ds_config": config or {}, "ds_version": "0.18"}, directory / file
            )
        for rank in range(ranks if stage == 3 else 1):
            prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            torch.save(
                _model_state(model, names, flat, stage, frozen, rank, ranks),
                directory / f"{prefix}mp_rank_00_model_states.pt",
            )
    return directory


def _without_padding(parts: list[Tensor], part: list[nn.Parameter], rank: int) -> Tensor:
    padding = sum(p.numel() for p in parts) - sum(p.numel() for p in part)
    return parts[rank][: len(parts[rank]) - padding] if rank == len(parts) - 1 else parts[rank]


def _model_state(
    model: nn.Module, names: dict[Any, str], flat: list[Any], stage: int, frozen: Sequence[str], rank: int, ranks: int
) -> dict[str, Any]:
    """Return what ``engine._common_checkpoint_state`` saves, as far as a reader may want it."""
    state = model.state_dict()
    parameters = dict(model.named_parameters())
    tied = {
        name: next(n for p, n in names.items() if p is parameters_all[name])
        for parameters_all in [dict(model.named_parameters(remove_duplicate=False))]
        for name in parameters_all
        if name not in parameters
    }
    shapes = [OrderedDict((names[p], p.shape) for p in part) for _, part in flat]
    fragments = {
        name: split_shares([parameters[name].detach()], ranks)[rank] if stage == 3 else parameters[name].detach()
        for name in frozen
    }
    module = {
        name: torch.empty(0) if stage == 3 and name not in dict(model.named_buffers()) else value.bfloat16()
        for name, value in state.items()
    }
    return {
        "module": module,
        "buffer_names": [name for name, _ in model.named_buffers() if name in state],
        "optimizer": None,
        "param_shapes": shapes,
        "frozen_param_shapes": {name: parameters[name].shape for name in frozen} if stage > 1 else None,
        "frozen_param_fragments": fragments if stage > 1 else None,
        "shared_params": tied,
        "lr_scheduler": None,
        "sparse_tensor_module_names": {"none"},
        "skipped_steps": 0,
        "global_steps": 2,
        "dp_world_size": ranks,
        "ds_version": "0.18",
        "client_state": Path("made/on/another/machine"),
    }
