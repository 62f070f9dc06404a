"""States of other optimizers than AdamW are refused by name."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.scales_model import Scales, shuffled_groups
from helpers.versions import TORCH
from torch import nn
from transformers.optimization import Adafactor

from fx_influence.interop.checkpoints.load import restore_optimizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",  # peft reads it
)


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


OTHERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    f"torch.optim.{name}": kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "AdamW")
} | {"the Adafactor of transformers": Adafactor}


# without decay it is AdamW
OTHERS["torch.optim.Adam"] = functools.partial(torch.optim.Adam, weight_decay=0.1)

# no field is theirs alone
UNNAMED = {"torch.optim.SparseAdam", "torch.optim.RAdam"}


if TORCH < (2, 7):
    # there its state dict cannot be told from AdamW's
    del OTHERS["torch.optim.Adam"]


@pytest.mark.parametrize("name", OTHERS)
def test_restore_names_other_optimizers(name: str) -> None:
    model = Matrix()
    optimizer = OTHERS[name](model.parameters())
    model.weight.grad = torch.ones(4, 4)
    if name != "torch.optim.SparseAdam":
        optimizer.step(lambda: model.weight.sum().item())
    of = "has the fields" if name in UNNAMED else re.escape(name.replace("torch.optim.Muon", "Muon"))
    with pytest.raises(TypeError, match=rf"the optimizer's state.*{of}.*expected torch\.optim\.AdamW"):
        restore_optimizer(optimizer.state_dict(), model)


BITSANDBYTES = {"alpha", "betas", "eps", "lr", "t_alpha", "t_beta3", "weight_decay"}


RECORDED: dict[str, tuple[str, set[str], set[str]]] = {
    "bitsandbytes 0.50": ("bitsandbytes", BITSANDBYTES, {"step", "__bnb_optimizer_quant_state__"}),
    "bitsandbytes 0.42": (
        "bitsandbytes",
        {"betas", "eps", "lr", "weight_decay"},
        {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"},
    ),
    "lion-pytorch 0.2": ("Lion", {"betas", "lr", "weight_decay"}, {"exp_avg"}),
    "pytorch-optimizer 4.1, AdEMAMix": (
        "AdEMAMix",
        {"alpha", "betas", "eps", "fixed_decay", "foreach", "lr", "step", "t_alpha_beta3", "weight_decay"},
        {"exp_avg", "exp_avg_sq", "exp_avg_slow"},
    ),
    "schedulefree 1.4": (
        "schedule-free AdamW",
        {"betas", "eps", "k", "lr", "lr_max", "r", "train_mode", "warmup_steps", "weight_decay", "weight_lr_power"},
        {"z", "exp_avg_sq"},
    ),
    "galore-torch 1.0": (
        "GaLore",
        {"betas", "correct_bias", "eps", "lr", "proj_type", "rank", "scale", "update_proj_gap", "weight_decay"},
        {"step", "exp_avg", "exp_avg_sq"},
    ),
    "pytorch-optimizer 4.1, SOAP": (
        "SOAP",
        {"betas", "correct_bias", "eps", "lr", "precondition_frequency", "shampoo_beta", "weight_decay"},
        {"exp_avg", "exp_avg_sq", "GG", "Q"},
    ),
    "pytorch-optimizer 4.1, Prodigy": (
        "Prodigy",
        {"beta3", "betas", "d", "d0", "d_coef", "d_max", "eps", "growth_rate", "lr", "weight_decay"},
        {"s", "p0", "exp_avg", "exp_avg_sq"},
    ),
}
"""Each library's format of an optimizer, and fields of its groups and states, from ``state_dict()`` or source."""


@pytest.mark.parametrize("version", RECORDED)
def test_restore_names_optimizers_of_other_libraries(version: str) -> None:
    of, group, entry = RECORDED[version]
    saved = {
        "param_groups": [dict.fromkeys(group, 0.0) | {"params": [0]}],
        "state": {0: dict.fromkeys(entry, torch.zeros(4, 4))},
    }
    with pytest.raises(TypeError, match=rf"as of {of}.*; expected torch\.optim\.AdamW"):
        restore_optimizer(saved, Matrix())


@pytest.mark.parametrize("field", [{"momentum": 0.9}, {"betas": (0.9, 0.99, 0.999)}], ids=str)
def test_restore_refuses_group_fields_adamw_lacks(field: dict[str, Any]) -> None:
    optimizer, names = shuffled_groups(Scales(), names=False)
    saved = optimizer.state_dict()
    saved["param_groups"][1].update(field)
    with pytest.raises(TypeError, match=r"param_groups\[1\].*expected torch\.optim\.AdamW"):
        restore_optimizer(saved, Scales(), names)


def test_restore_refuses_8_bit_state() -> None:
    model = Scales()
    optimizer, names = shuffled_groups(model, names=False)
    saved = optimizer.state_dict()
    saved["state"][3] = {"step": 1, "state1": torch.zeros(4, dtype=torch.uint8), "state2": torch.zeros(4)}
    with pytest.raises(
        TypeError, match=r"parameter 3 has .*'state1', 'state2', 'step'\], .*bitsandbytes.*expected torch"
    ):
        restore_optimizer(saved, model, names)


class Quantized(torch.Tensor):
    """An 8-bit tensor as torchao keeps its 8-bit states."""


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.zeros(4).as_subclass(Quantized), r"Quantized of torch\.float32"),
        (torch.zeros(4, dtype=torch.uint8), r"Tensor of torch\.uint8"),
        (torch.zeros(4, dtype=torch.int32), r"Tensor of torch\.int32"),
        (torch.zeros(4).to(torch.float8_e4m3fn), r"Tensor of torch\.float8_e4m3fn"),
    ],
)
def test_restore_refuses_quantized_moments(value: torch.Tensor, kind: str) -> None:
    optimizer, names = shuffled_groups(Scales(), names=False)
    saved = optimizer.state_dict()
    saved["state"][3]["exp_avg_sq"] = value
    with pytest.raises(TypeError, match=rf"parameter 3 has a {kind} as exp_avg_sq, .*8-bit.*; expected torch"):
        restore_optimizer(saved, Scales(), names)


def test_restore_refuses_unknown_state_field() -> None:
    optimizer, names = shuffled_groups(Scales(), names=False)
    saved = optimizer.state_dict()
    saved["state"][3]["last_grad"] = torch.zeros(4)
    with pytest.raises(
        TypeError, match=r"parameter 3 has the fields .*'last_grad', 'step'\]; expected torch.optim.AdamW"
    ):
        restore_optimizer(saved, Scales(), names)
