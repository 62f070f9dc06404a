"""The share of a step that rounding of the weights swallows, and the warning of it."""

from __future__ import annotations

import pytest
import torch

from fx_influence.interop.live.precision import rounding_warning, step_rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_rounding_is_the_lost_share_of_the_step(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    theta = {"w": torch.randn(1000, generator=generator).to(dtype)}
    v = {"w": torch.randn(1000, generator=generator)}
    moved = {"w": (theta["w"] + (1e-4 * v["w"]).to(dtype)).float() - theta["w"].float()}
    share = step_rounding(moved, v, 1e-4)
    # A weight of size 1 is rounded by at most half a unit, to a step of 1e-4.
    assert share <= torch.finfo(dtype).eps / 1e-4 if dtype == torch.float32 else share > 0.5
    assert step_rounding(moved, v, 0.0) == 0.0


@pytest.mark.parametrize(
    ("dtype", "remedy"), [(torch.bfloat16, "train float32 weights"), (torch.float32, "at this lea")]
)
def test_rounding_warning_depends_on_the_weights_dtype(dtype: torch.dtype, remedy: str) -> None:
    text = rounding_warning(3, {"w": torch.ones(1, dtype=dtype)}, 0.25)
    assert text.startswith("step 3: 25% of the step is lost")
    assert f"; {remedy}" in text
