"""Settings of DeepSpeed under which steps cannot be measured are refused, with the remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fx_influence as fx
from fx_influence.interop.zero.settings import check_config, check_partitions

STAGE_2, STAGE_3 = {"stage": 2}, {"stage": 3}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no stage": ({}, "stage is 0 in .*; expected 1, 2 or 3. Take one of them, or launch without DeepSpeed"),
    "hpZ": (
        {"zero_optimization": {**STAGE_3, "zero_hpz_partition_size": 8}},
        "zero_hpz_partition_size is 8 in .*; expected 1, .*Leave zero_hpz_partition_size out",
    ),
    "quantised weights": (
        {"zero_optimization": {**STAGE_3, "zero_quantized_weights": True}},
        "zero_quantized_weights is True in .*; expected False, .*Leave zero_quantized_weights out",
    ),
    "optimizer offload": (
        {"zero_optimization": {**STAGE_2, "offload_optimizer": {"device": "cpu"}}},
        "offload_optimizer.device is 'cpu' in .*Leave offload_optimizer out",
    ),
    "parameter offload": (
        {"zero_optimization": {**STAGE_2, "offload_param": {"device": "nvme"}}},
        "offload_param.device is 'nvme' in .*Leave offload_param out",
    ),
    "fp16": ({"zero_optimization": STAGE_2, "fp16": {"enabled": True}}, "fp16.enabled is True in .*fp16=False"),
    "fp16 of the trainer": (
        {"zero_optimization": STAGE_2, "fp16": {"enabled": "auto"}},
        "fp16.enabled is 'auto' in .*bf16=True, or fp16=False, in the trainer's config",
    ),
    "bfloat16 master weights": (
        {"zero_optimization": STAGE_2, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        "bf16_master_weights_and_grads is True in .*Leave it out, so that the master weights are float32",
    ),
    "autocast": (
        {"zero_optimization": STAGE_2, "torch_autocast": {"enabled": True}},
        "torch_autocast.enabled is True in .*Leave torch_autocast out",
    ),
    "FusedAdam": (
        {"zero_optimization": STAGE_2, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
        'torch_adam is False in .*Add "torch_adam": true',
    ),
    "Lamb": ({"zero_optimization": STAGE_2, "optimizer": {"type": "Lamb"}}, "optimizer.type is 'Lamb' in .*Take AdamW"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_check_config_names_setting_and_remedy(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(config, "fp16")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("bf16", ["auto", True, False])
def test_check_config_accepts_float32_and_bfloat16(stage: int, bf16: object) -> None:
    off = {"device": "none"}
    check_config(
        {
            "zero_optimization": {"stage": stage, "offload_optimizer": off, "offload_param": None},
            "bf16": {"enabled": bf16},
            "fp16": {"enabled": "auto"},
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        },
        "bf16",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round_robin_bit16_groups": [[torch.zeros(2, dtype=torch.float16)]]}, "trains weights in torch.float16"),
        ({"single_partition_of_fp32_groups": [torch.zeros(2).bfloat16()]}, "master weights are torch.bfloat16"),
        ({"cpu_offload": True}, "offloads the optimizer or the parameters"),
        ({"offload_param": True}, "offloads the optimizer or the parameters"),
    ],
)
def test_check_partitions_names_what_is_not_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_partitions(partitioned(torch.optim.AdamW, **change))


@pytest.mark.parametrize("field", ["dp_process_group", "real_dp_process_group"])
def test_check_partitions_refuses_groups_of_processes(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed partitions the experts of a mixture over groups of their own."""
    experts, world = object(), object()
    sizes = {experts: 2, world: 4, None: 4}
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: sizes[group])
    groups = {"dp_process_group": world, "real_dp_process_group": [world, world]}
    check_partitions(partitioned(torch.optim.AdamW, **groups))
    groups[field] = experts if field == "dp_process_group" else [world, experts]
    with pytest.raises(ValueError, match=r"partitions the optimizer over 2 of 4 processes; .*data parallelism alone"):
        check_partitions(partitioned(torch.optim.AdamW, **groups))


def partitioned(kind: Any, **changes: Any) -> Any:
    """Return a stand-in for DeepSpeed's optimizer around one of another kind, with some attributes changed."""
    parameter = nn.Parameter(torch.zeros(2))
    fields: dict[str, Any] = {
        "round_robin_bit16_groups": [[parameter]],
        "single_partition_of_fp32_groups": [parameter],
        "optimizer": kind([parameter]),
    }
    return SimpleNamespace(**{**fields, **changes})


def test_check_partitions_refuses_quantised_moments() -> None:
    kind: Any = type("AdamW8bit", (torch.optim.AdamW,), {"__module__": "torchao.optim.adam"})
    with pytest.raises(ValueError, match=r"partitions AdamW8bit, whose quantised moments .*optim='adamw_torch'"):
        check_partitions(partitioned(kind))


@pytest.mark.parametrize("name", ["FusedAdam", "FP16_Optimizer"])
def test_adamw_state_names_the_remedy_under_deepspeed(name: str) -> None:
    """Around a torch AdamW of one flat partition, whose parameters are none of the model's."""
    model = nn.Linear(2, 2)
    wrapper = type(name, (), {"__module__": "deepspeed.runtime.bf16_optimizer"})()
    wrapper.optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match=rf"optimizer is deepspeed.*{name}; .*stage to 1, 2 or 3.*torch_adam"):
        fx.adamw_state(wrapper, model)
