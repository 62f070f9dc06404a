"""A small model with a real AdamW over it."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def make_steps(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 2) -> None:
    for seed in range(times):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def make_stepped(**hyper: Any) -> tuple[nn.Sequential, torch.optim.AdamW]:
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), **hyper)
    make_steps(model, optimizer)
    return model, optimizer


def wrap_by_accelerate(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    wrapper = Accelerator(cpu=True).prepare(optimizer)
    assert not isinstance(wrapper, type(optimizer))
    return wrapper
