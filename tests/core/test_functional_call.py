"""Modules are called on tensors by name with torch's own linear map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fx_influence.core.functional_call import functional_call


class WithoutForwardMode(torch.autograd.Function):
    """Linear map with a backward alone, as DeepSpeed's ``LinearFunctionForZeroStage3`` (0.19.8)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t()


def test_functional_call_has_forward_mode_under_zero3(monkeypatch: pytest.MonkeyPatch) -> None:
    def replacement(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return WithoutForwardMode.apply(x, weight)  # type: ignore[no-any-return]  # of autograd

    replacement.__module__ = "deepspeed.runtime.zero.linear"
    monkeypatch.setattr(F, "linear", replacement)
    x, weight, v = torch.ones(2), torch.ones(3, 2), torch.full((3, 2), 2.0)
    module = nn.Linear(2, 3, bias=False)
    tangent = torch.func.jvp(lambda w: functional_call(module, {"weight": w}, (x,), {}), (weight,), (v,))[1]
    assert torch.equal(tangent, torch.full((3,), 4.0))
    assert F.linear is replacement
