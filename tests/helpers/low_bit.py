"""A small model whose weights are large enough for quantised moments, stepped by real low-bit optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fx_influence as fx
from fx_influence.interop.optimizers import adamw_state

LR, DECAY = 1e-2, 0.3
"""A learning rate at which a step is far above the rounding of the weights."""

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def make_wide_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return layers of 4480 entries, 17.5 blocks of 256, and 8192 entries, with small biases."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 64), nn.Linear(64, 128)).to(dtype)


def set_gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Give every parameter a random gradient, rows of very different size, and return them by name."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        size = torch.rand(len(p), *[1] * (p.dim() - 1), generator=generator) ** 4
        p.grad = (1e-3 * size * torch.randn(p.shape, generator=generator)).to(p.dtype)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Step(NamedTuple):
    """One real step: theta' - theta, what AdamW's map foretold of it, and theta, by name."""

    moved: dict[str, Tensor]
    foretold: dict[str, Tensor]
    before: dict[str, Tensor]


def stepped(make: MakeOptimizer, steps: int = 3) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Return a model and its optimizer after some steps."""
    model = make_wide_net()
    optimizer = make(model.parameters())
    with torch.compiler.set_stance("force_eager"):
        for seed in range(steps):
            set_gradients(model, seed)
            optimizer.step()
    return model, optimizer


def foretell_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Make one more step, foretold from ``adamw_state``."""
    grads: dict[str, Any] = set_gradients(model, 99)
    state = adamw_state(optimizer, model)
    params = {name: p.detach() for name, p in model.named_parameters()}
    direction = fx.adamw_decompose(grads, state, params).direction
    before = {name: p.clone() for name, p in params.items()}
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    return Step(
        {name: params[name].double() - before[name].double() for name in params},
        {name: state.lr * v.double() for name, v in direction.items()},
        before,
    )
