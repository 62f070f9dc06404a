"""Float64 stays float64 however a model asks for float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fx_influence.policy.modes.float64 import StayFloat64

ONE = 1 + torch.rand(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NARROW = torch.arange(3, dtype=torch.float32)


def filled() -> Tensor:
    out = torch.zeros(3)
    out[torch.arange(3)] = ONE.float()
    return out


ASKS: dict[str, Callable[[], Tensor]] = {
    "to": lambda: ONE.to(torch.float32),
    "to by name": lambda: ONE.to(dtype=torch.float32),
    "to another": lambda: ONE.to(NARROW),
    "float": lambda: ONE.float(),
    "type": lambda: ONE.type(torch.float32),
    "type by name": lambda: ONE.type("torch.FloatTensor"),
    "type_as": lambda: ONE.type_as(NARROW),
    "sum": lambda: ONE.unsqueeze(0).sum(0, dtype=torch.float32),
    "mean": lambda: ONE.unsqueeze(0).mean(0, dtype=torch.float32),
    "cumsum": lambda: ONE.unsqueeze(0).cumsum(0, dtype=torch.float32)[0],
    "zeros": filled,
    "zeros of a dtype": lambda: torch.zeros(3, dtype=torch.float32) + ONE,
    "a product with float32": lambda: torch.matmul(torch.eye(3), ONE),
    "einsum": lambda: torch.einsum("ij,j->i", torch.eye(3), ONE),
}


@pytest.mark.parametrize("ask", ASKS)
def test_stay_float64_overrides_float32_requests(ask: str) -> None:
    with StayFloat64():
        actual = ASKS[ask]()
    assert actual.dtype == torch.float64
    assert torch.equal(actual, ONE)


def test_stay_float64_covers_softmax_and_linear() -> None:
    with StayFloat64():
        actual = torch.nn.functional.softmax(ONE, dim=-1, dtype=torch.float32)
        mapped = torch.nn.functional.linear(ONE, torch.eye(3, dtype=torch.float64).float())
    assert torch.equal(actual, ONE.softmax(-1))
    assert torch.equal(mapped, ONE)


def test_stay_float64_leaves_in_place_targets() -> None:
    target = torch.zeros(3, dtype=torch.float32)
    with StayFloat64():
        target.copy_(ONE)
        target.add_(1)
    assert target.dtype == torch.float32
    assert torch.equal(target, ONE.float() + 1)
