"""Check under which settings of DeepSpeed steps can be measured: ZeRO with torch's AdamW, not in float16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from fx_influence.interop.low_bit.moments import is_low_bit
from fx_influence.interop.zero.partitions import forward_weights, is_zero_optimizer, master_partitions
from fx_influence.interop.zero.stage3 import check_chunks, is_stage3

_ONE_PARTITION: dict[str, Any] = {
    "zero_hpz_partition_size": 1,
    "mics_shard_size": -1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
}
"""Settings of stage 3 under which parameters have other partitions than one for each process -> their defaults."""


def check_config(config: Mapping[str, Any], mixed_precision: str = "no") -> None:
    """Raise ``ValueError`` for a configuration of DeepSpeed under which steps cannot be measured, with the remedy.

    Args:
        config: DeepSpeed's, in which "auto" may stand for what a trainer fills in.
        mixed_precision: that a trainer fills in, "no", "fp16" or "bf16".

    Example:
        >>> check_config({"zero_optimization": {"stage": 0}})
        Traceback (most recent call last):
        ...
        ValueError: zero_optimization.stage is 0 in DeepSpeed's configuration; expected 1, 2 or 3. Take one of them, \
or launch without DeepSpeed (--multi_gpu)
    """
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage == 0:
        raise _unexpected(
            "zero_optimization.stage",
            stage,
            "1, 2 or 3",
            "Take one of them, or launch without DeepSpeed (--multi_gpu)",
        )
    for field, off in _ONE_PARTITION.items() if stage == 3 else ():
        if zero.get(field, off) != off:
            raise _unexpected(
                f"zero_optimization.{field}",
                zero[field],
                f"{off!r}, under which every process has one partition of each parameter, in its own precision",
                f"Leave {field} out",
            )
    for field in ("offload_optimizer", "offload_param"):
        device = (zero.get(field) or {}).get("device", "none")
        if device != "none":
            raise _unexpected(
                f"zero_optimization.{field}.device",
                device,
                "'none', since the passes run where moments and weights are",
                f"Leave {field} out",
            )
    if _is_fp16(config, mixed_precision):
        raise _unexpected(
            "fp16.enabled",
            config["fp16"]["enabled"],
            "False, since gradients are then multiplied by a loss scale that skips steps",
            "Train in bfloat16 or float32 (bf16=True, or fp16=False, in the trainer's config), or launch without "
            "DeepSpeed, where fp16 is autocast over float32 weights",
        )
    if (config.get("bf16") or {}).get("bf16_master_weights_and_grads", False):
        raise _unexpected(
            "bf16.bf16_master_weights_and_grads",
            True,
            "False, since AdamW then moves bfloat16 weights, whose steps are lost to rounding at RL's learning rates",
            "Leave it out, so that the master weights are float32",
        )
    if (config.get("torch_autocast") or {}).get("enabled", False):
        raise _unexpected(
            "torch_autocast.enabled",
            True,
            "False, since DeepSpeed then averages gradients in that precision",
            "Leave torch_autocast out",
        )
    _check_optimizer(config.get("optimizer"))


def _is_fp16(config: Mapping[str, Any], mixed_precision: str) -> bool:
    """Return whether float16 is enabled, by the configuration or by the trainer that fills it in."""
    enabled = (config.get("fp16") or {}).get("enabled", False)
    return enabled is True or (enabled == "auto" and mixed_precision == "fp16")


def _check_optimizer(optimizer: Mapping[str, Any] | None) -> None:
    """Raise ``ValueError`` for an optimizer that DeepSpeed makes itself and that is not torch's AdamW."""
    if optimizer is None:
        return
    kind, settings = str(optimizer.get("type", "")), optimizer.get("params") or {}
    if kind.lower() not in ("adam", "adamw"):
        raise _unexpected("optimizer.type", kind, "AdamW", "Take AdamW, or leave the optimizer to the trainer")
    if not settings.get("torch_adam", False):
        raise _unexpected(
            "optimizer.params.torch_adam",
            settings.get("torch_adam", False),
            "True, since DeepSpeed's FusedAdam keeps another state than torch's AdamW",
            'Add "torch_adam": true, or leave "optimizer" out, so that the trainer makes torch\'s AdamW',
        )


def check_partitions(optimizer: Any) -> None:
    """Raise ``ValueError`` for an optimizer of ZeRO whose partitions are not read, with the remedy.

    Args:
        optimizer: DeepSpeed's, without wrappers.
    """
    dtype, masters = forward_weights(optimizer)[0][0].dtype, master_partitions(optimizer)[0].dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"DeepSpeed trains weights in {dtype}, with a loss scale; expected torch.bfloat16 or torch.float32. Leave "
            "fp16 out of its configuration, and of the trainer's"
        )
    if masters != torch.float32:
        raise ValueError(
            f"DeepSpeed's master weights are {masters}, in which steps are lost to rounding; expected torch.float32. "
            "Leave bf16_master_weights_and_grads out of its configuration"
        )
    if any(getattr(optimizer, name, False) for name in ("cpu_offload", "offload_optimizer", "offload_param")):
        raise ValueError(
            "DeepSpeed offloads the optimizer or the parameters; expected partitions where the passes run. Leave "
            "offload_optimizer and offload_param out of its configuration"
        )
    if is_low_bit(optimizer.optimizer):
        raise ValueError(
            f"DeepSpeed partitions {type(optimizer.optimizer).__name__}, whose quantised moments are not read from "
            "partitions; expected torch.optim.AdamW. Set optim='adamw_torch', or launch without DeepSpeed"
        )
    groups = [getattr(optimizer, "dp_process_group", None), *getattr(optimizer, "real_dp_process_group", ())]
    size = min((dist.get_world_size(group) for group in groups if group is not None), default=None)
    if size is not None and size != dist.get_world_size():
        raise ValueError(
            f"DeepSpeed partitions the optimizer over {size} of {dist.get_world_size()} processes; expected all of "
            "them. Launch with data parallelism alone"
        )
    if is_stage3(optimizer):
        check_chunks(optimizer)


def why_refused(optimizer: object) -> str | None:
    """Return why an optimizer of DeepSpeed is refused, with the remedy; None for ZeRO and for all others."""
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    is_of_deepspeed = any(kind.__module__.startswith("deepspeed.") for kind in type(optimizer).__mro__)
    if not is_of_deepspeed or is_zero_optimizer(optimizer):
        return None
    return (
        f"optimizer is {name}; expected torch.optim.AdamW under a stage of ZeRO. Set zero_optimization.stage to 1, 2 "
        "or 3, add \"torch_adam\": true to the optimizer's params in DeepSpeed's configuration, and leave fp16 and "
        "offload out of it"
    )


def _unexpected(field: str, value: object, expected: str, remedy: str) -> ValueError:
    return ValueError(f"{field} is {value!r} in DeepSpeed's configuration; expected {expected}. {remedy}")
