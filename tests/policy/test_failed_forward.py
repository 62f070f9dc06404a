"""A forward that fails after it has registered something leaves the policy as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fx_influence as fx


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Parametrizing(nn.Module):
    """Parametrizes its map for the time of a forward, and does not take that back when it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.map = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.table.weight.requires_grad_(False)
        self.limit = 5

    def forward(self, input_ids: Tensor) -> Tensor:
        parametrize.register_parametrization(self.map, "bias", Doubled())
        if int(input_ids.max()) >= self.limit:
            raise ArithmeticError("inside the model")
        logits: Tensor = self.map(self.table(input_ids))
        parametrize.remove_parametrizations(self.map, "bias", leave_parametrized=False)
        return logits


def test_failed_forward_leaves_no_parametrization() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="runs on none of the few tokens"):
        apply, params = fx.make_functional(Parametrizing().double())
    ids = torch.tensor([[1, 2, 3]])
    before = apply(params, ids, ids > 0)
    for _ in range(2):
        # torch's own restoring fails in its turn, over what is left registered.
        with pytest.raises((ArithmeticError, KeyError)):
            apply(params, ids + 4, ids > 0)
        assert torch.equal(apply(params, ids, ids > 0), before)
