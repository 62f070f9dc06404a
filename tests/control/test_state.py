"""Sums over steps: forgetting is exact, weights in force are divided out, kinds are known by name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from helpers.cases import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

import fx_influence as fx
from fx_influence.control import ControlState, KindSums

KINDS = ("A>0", "A<0", "A=0")


def random_sums(seed: int, kinds: tuple[str, ...] = KINDS, degrees: float = 7.0) -> KindSums:
    generator = torch.Generator().manual_seed(seed)
    count = len(kinds)
    delta, r = torch.randn(2, count, generator=generator, dtype=torch.float64)
    roots = torch.randn(2, count, count, generator=generator, dtype=torch.float64)
    return KindSums(kinds, delta, r, roots[0] @ roots[0].T, roots[1] @ roots[1].T, delta.sum(), degrees)


def accumulated(steps: list[KindSums], forgetting: float) -> ControlState:
    state = fx.control.control_state()
    for sums in steps:
        state = fx.control.update(state, sums, forgetting=forgetting)
    return state


@settings(max_examples=20)
@given(st.integers(1, 8), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_forgetting_is_exponential(count: int, forgetting: float) -> None:
    steps = [random_sums(seed) for seed in range(count)]
    factors = [forgetting**age for age in reversed(range(count))]
    estimate = accumulated(steps, forgetting).estimate()
    total = sum(factors)
    for name in ("entropy", "reward", "rest"):
        mean = sum(a * getattr(x, name) for a, x in zip(factors, steps, strict=True)) / total
        assert_close(getattr(estimate, name), mean, float(count))
    for name in ("entropy_covariance", "reward_covariance"):
        mean = sum(a**2 * getattr(x, name) for a, x in zip(factors, steps, strict=True)) / total**2
        assert_close(getattr(estimate, name), mean, float(count))
    squares = sum(a**2 for a in factors)
    assert estimate.degrees_of_freedom == pytest.approx(squares**2 / sum(a**4 / 7 for a in factors))


@settings(max_examples=10)
@given(st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5]), min_size=3, max_size=3))
def test_weights_in_force_are_divided_out(weights: list[float]) -> None:
    plain, w = random_sums(0), torch.tensor(weights, dtype=torch.float64)
    weighted = plain._replace(
        entropy=w * plain.entropy,
        reward=w * plain.reward,
        entropy_covariance=w.outer(w) * plain.entropy_covariance,
        reward_covariance=w.outer(w) * plain.reward_covariance,
    )
    in_force = dict(zip(KINDS, weights, strict=True))
    state = fx.control.update(fx.control.control_state(), weighted, forgetting=0.9, in_force=in_force)
    assert_states_close(state, accumulated([plain], 0.9))


def assert_states_close(a: ControlState, b: ControlState) -> None:
    assert a.kinds == b.kinds
    for x, y in zip(a[1:], b[1:], strict=True):
        assert_close(torch.as_tensor(x).double(), torch.as_tensor(y).double(), 10.0)


def test_kind_of_weight_zero_keeps_its_estimate() -> None:
    state = accumulated([random_sums(0)], 0.5)
    shut = random_sums(1)
    after = fx.control.update(state, shut, forgetting=0.5, in_force={"A<0": 0.0})
    before, estimate = state.estimate(), after.estimate()
    assert estimate.entropy[1] == before.entropy[1]
    assert estimate.entropy_covariance[1, 1] == before.entropy_covariance[1, 1]
    assert after.evidence.tolist() == [1.5, 1.0, 1.5]
    assert torch.linalg.eigvalsh(estimate.entropy_covariance).min() > -1e-12 * estimate.entropy_covariance.trace()


def test_steps_of_a_new_optimizer_change_nothing() -> None:
    state = accumulated([random_sums(0)], 0.5)
    assert fx.control.update(state, random_sums(1)._replace(conditioning=0.9), forgetting=0.5) is state
    assert fx.control.update(state, random_sums(1)._replace(conditioning=0.4), forgetting=0.5).steps == 1.5


def test_update_knows_kinds_by_name() -> None:
    first, second = random_sums(0, ("A>0",)), random_sums(1, ("A<0", "A>0"))
    state = accumulated([first, second], 0.5)
    assert state.kinds == ("A>0", "A<0")
    assert_close(state.entropy, torch.stack([0.5 * first.entropy[0] + second.entropy[1], second.entropy[0]]))
    assert state.entropy_covariance[0, 1] == second.entropy_covariance[1, 0]


def test_values_of_state_pass_through_json() -> None:
    state = accumulated([random_sums(0), random_sums(1)], 0.9)
    read = fx.control.from_values(json.loads(json.dumps(fx.control.to_values(state))))
    assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(state[1:], read[1:], strict=True))
    assert read.kinds == state.kinds


def bad(name: str, value: Any) -> KindSums:
    return random_sums(0)._replace(**{name: value})


@pytest.mark.parametrize(
    "sums",
    [
        bad("entropy", torch.tensor([1.0, math.nan, 0.0])),
        bad("reward", torch.zeros(2)),
        bad("rest", torch.tensor(math.inf)),
        bad("degrees_of_freedom", 0.0),
    ],
)
def test_update_refuses_sums_that_are_no_numbers(sums: KindSums) -> None:
    with pytest.raises(ValueError, match="Make them with kind_sums"):
        fx.control.update(fx.control.control_state(), sums, forgetting=0.9)


def test_update_refuses_numbers_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"forgetting is 1.5; expected a factor from 0 to 1"):
        fx.control.update(fx.control.control_state(), random_sums(0), forgetting=1.5)
    with pytest.raises(ValueError, match="expected weights of at least 0"):
        fx.control.update(fx.control.control_state(), random_sums(0), forgetting=1, in_force={"A>0": -1.0})
    with pytest.raises(ValueError, match="no state of a controller"):
        fx.control.from_values({"kinds": ["A>0"], "evidence": [1.0, 2.0]})
