"""A model whose parameters all have one shape, so that only names tell them apart."""

from __future__ import annotations

import torch
from torch import nn


class Scale(nn.Module):
    """Two parameters of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.bias = nn.Parameter(torch.zeros(4))


class Scales(nn.Module):
    """Every parameter has the same shape, and every other one has no weight decay in the Trainer's rule."""

    def __init__(self) -> None:
        super().__init__()
        self.layer0, self.layer1, self.layer2 = Scale(), Scale(), Scale()


def shuffled_groups(model: nn.Module, names: bool) -> tuple[torch.optim.AdamW, list[list[str]]]:
    """Return an AdamW over three groups in another order than the model's, after a step, and their names."""
    parameters = list(model.named_parameters())[::-1]
    groups = [parameters[:1], parameters[1:4], parameters[4:]]
    optimizer = torch.optim.AdamW([{"params": group if names else [p for _, p in group]} for group in groups])
    for index, (_, parameter) in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, index + 1.0)
    optimizer.step()
    return optimizer, [[name for name, _ in group] for group in groups]
