"""Weights that keep the entropy: feasible, at the least cost, and all 1 where nothing has to be left out."""

from __future__ import annotations

import pytest
import torch
from helpers.arguments import shared_arguments
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fx_influence as fx


def influence(parts: Tensor, baseline: float = 0.0) -> fx.Influence:
    zero = torch.zeros((), dtype=torch.float64)
    rows = parts if parts.dim() == 1 else parts.sum(-1)
    base = zero + baseline
    return fx.Influence(
        per_sequence=rows,
        per_token=parts if parts.dim() == 2 else None,
        stderr=rows,
        baseline=base,
        momentum=base,
        weight_decay=zero,
        total=base + rows.sum(),
        residual=zero,
        unattributed=zero,
        per_parameter={},
        matrix=None,
        total_stderr=zero,
        rounding=torch.full_like(rows, torch.nan),
    )


def cheapest(deltas: Tensor, rewards: Tensor, missing: float) -> float:
    """Solve the fractional knapsack by hand, the largest ratio of entropy to reward first."""
    pairs = sorted((max(r, 0.0) / -d, -d) for d, r in zip(deltas.tolist(), rewards.tolist(), strict=True) if d < 0)
    cost = 0.0
    for price, gain in pairs:
        taken = min(gain, max(missing, 0.0))
        cost, missing = cost + price * taken, missing - taken
    return cost


eighths = st.integers(-40, 40).map(lambda k: k / 8)
numbers = st.lists(st.tuples(eighths, eighths), min_size=1, max_size=12)


@given(numbers, eighths, st.floats(0.05, 1.2))
def test_select_meets_floor_at_least_loss(pairs: list[tuple[float, float]], baseline: float, share: float) -> None:
    deltas, rewards = torch.tensor(pairs, dtype=torch.float64).T
    capacity = -float(deltas.clamp(max=0).sum())
    total = baseline + float(deltas.sum())
    floor = total + share * capacity
    out = fx.lab.select(influence(deltas, baseline), influence(rewards), floor=floor)
    assert ((out.weights >= 0) & (out.weights <= 1)).all()
    assert (out.weights[deltas >= 0] == 1).all()
    torch.testing.assert_close(out.entropy, baseline + (out.weights * deltas).sum())
    torch.testing.assert_close(out.reward, (out.weights * rewards).sum())
    size = float(deltas.abs().sum()) + 1e-12
    if share <= 1:
        assert out.reached
        assert out.entropy >= floor - 1e-6 * size
        assert out.lost <= cheapest(deltas, rewards, share * capacity) + 1e-5 * float(rewards.abs().sum()) + 1e-9
        # No more is left out than the floor requires.
        assert out.entropy <= max(floor, total) + 1e-5 * size
    else:
        assert (out.weights[deltas < 0] == 0).all()
        assert out.reached == bool(out.entropy >= floor - 1e-6 * size)


def test_select_leaves_step_alone_above_floor() -> None:
    out = fx.lab.select(influence(torch.tensor([-1.0, 3.0])), influence(torch.tensor([-1.0, 1.0])), floor=0.0)
    assert out.weights.tolist() == [1, 1]
    assert out.lost == 0


def test_select_weighs_tokens_per_token() -> None:
    deltas, rewards = torch.tensor([[-4.0, 1.0], [-2.0, -2.0]]), torch.tensor([[0.0, 1.0], [5.0, 1.0]])
    out = fx.lab.select(influence(deltas), influence(rewards), floor=-2.0, per_token=True)
    # The first token costs nothing and gives 4; the last gives the rest.
    torch.testing.assert_close(out.weights, torch.tensor([[0.0, 1.0], [1.0, 0.5]], dtype=torch.float64))
    torch.testing.assert_close(out.lost, torch.tensor(0.5, dtype=torch.float64))


def test_select_rejects_invalid_input() -> None:
    two, three = influence(torch.ones(2)), influence(torch.ones(3))
    with pytest.raises(
        ValueError, match=r"influence_reward has shape \(3,\); expected that of influence_entropy, \(2,\). Pass two"
    ):
        fx.lab.select(two, three, floor=0.0)
    with pytest.raises(
        ValueError, match=r"hold no tokens; expected influences of tokens. Make them with influence\(per_token=True\)"
    ):
        fx.lab.select(two, two, floor=0.0, per_token=True)


def test_select_rejects_other_types() -> None:
    out = shared_arguments().influence()
    with pytest.raises(TypeError, match=r"influence_reward is of type Tensor; expected an Influence"):
        fx.lab.select(out, out.per_sequence, floor=0.0)
    with pytest.raises(TypeError, match=r"floor is None; expected a number"):
        fx.lab.select(out, out, floor=None)  # type: ignore[arg-type]  # refused
