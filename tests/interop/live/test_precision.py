"""The share of a step that rounding of the weights swallows, and the warning of it."""

from __future__ import annotations

import math

import pytest
import torch

from fx_influence.interop.live.precision import StepRoundings, moment_rounding, rounding_warning, step_rounding
from fx_influence.optim.step import AdamWStep
from fx_influence.types import AdamWHyper, AdamWState


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


def test_moment_rounding_is_the_changed_share_of_the_moments() -> None:
    """m' = 0.9 (1, -2) + 0.1 * 0.5 (2, 4) = (1, -1.6); what is stored differs by (0, 0.6)."""
    m, g, zero = torch.tensor([1.0, -2.0]), torch.tensor([2.0, 4.0]), torch.zeros(2)
    state = AdamWState({"w": m}, {"w": zero}, {}, {"w": 1}, {"w": AdamWHyper()}, lr=1e-3)
    step = AdamWStep({"w": g}, state, {"w": zero}, "frozen", torch.tensor(0.5))
    share = moment_rounding(step, {"w": torch.tensor([1.0, -1.0]), "not held": zero})
    assert share == pytest.approx(0.6 / (1 + 1.6**2) ** 0.5, rel=1e-6)


def test_moment_rounding_is_zero_without_a_step() -> None:
    state = AdamWState({}, {}, {}, {}, {}, lr=1e-3)
    assert moment_rounding(AdamWStep({}, state, {}, "frozen", torch.ones(())), {}) == 0.0


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ((0.05, math.nan), None),
        ((0.25, math.nan), "step 3: 25% of the step is lost to the rounding of the trained weights"),
        ((1e-6, 0.05), None),
        ((1e-6, 0.98), "step 3: the forward's weights are roundings of the float32 ones that the optimizer moves, and"),
        ((0.2, 1.5), "step 3: the forward's weights are roundings"),
    ],
)
def test_step_roundings_warn_of_more_than_a_tenth(shares: tuple[float, float], text: str | None) -> None:
    """Weights in bfloat16 that AdamW moves itself lose their step; roundings of float32 ones move later."""
    roundings = StepRoundings(*shares, moment_rounding=math.nan)
    warning = roundings.warning(3, {"w": torch.ones(1, dtype=torch.bfloat16)}, at_random=False)
    assert warning is None if text is None else warning is not None and warning.startswith(text)


def test_rounding_warning_names_rounding_at_random() -> None:
    text = rounding_warning(3, {"w": torch.ones(1, dtype=torch.bfloat16)}, 0.25, at_random=True)
    assert "at random changed the step by 25% of its length, which averages out" in text
