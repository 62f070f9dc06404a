"""Samples of another temperature are told from the policy's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fx_influence.interop.live.policy_checks import check_temperature
from fx_influence.types import Batch


@pytest.mark.parametrize("sharpness", [0.3, 3.0, 12.0])
def test_check_temperature_tells_samples_of_another(sharpness: float) -> None:
    """It holds for a policy that is nearly sure, where standard errors from a sample would be far too small."""
    generator = torch.Generator().manual_seed(0)
    logits = sharpness * torch.randn(16, 20, 7, generator=generator)
    mask = torch.ones(16, 20, dtype=torch.bool)
    batch = Batch(mask.long(), mask, mask)

    def sampled(factor: float) -> Tensor:
        probabilities = (logits / factor).softmax(-1).flatten(0, 1)
        return torch.multinomial(probabilities, 1, generator=generator).view(16, 20, 1)

    def scored(factor: float, tokens: Tensor) -> Tensor:
        return (logits / factor).log_softmax(-1).gather(-1, tokens)[..., 0]

    of_policy, hotter = sampled(1.0), sampled(1.8)
    check_temperature(lambda factor: scored(factor, of_policy), batch)
    # A nearly flat policy samples alike at every temperature.
    if sharpness > 1:
        with pytest.raises(ValueError, match="times likelier"):
            check_temperature(lambda factor: scored(factor, hotter), batch)
