"""Windows of the benchmarks ``several_steps``: made again by torch's AdamW, without a rollout, and their predictors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.tolerances import TINY_POLICY, assert_within, rounding_bound
from helpers.toy_policy import toy_policy

import fx_influence as fx
from benchmarks.evidence.arithmetic import fresh_optimizer, reinforce
from benchmarks.evidence.bench_counterfactual import MAX_NORM, Step
from benchmarks.evidence.bench_several_steps import in_float64
from benchmarks.evidence.replayed_windows import recorded_window, replayed, share_at_end, without_row
from benchmarks.evidence.training_runs import Policy
from benchmarks.real.window_recording import rows_by_step
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.losses import coefficients
from fx_influence.trajectory.replay import params_after
from fx_influence.types import Batch

LR = 1e-3


@pytest.fixture(scope="module")
def policy() -> Policy:
    return toy_policy(4)


@pytest.fixture(scope="module")
def batches(policy: Policy) -> list[Batch]:
    drawn = []
    for seed in range(3):
        batch = policy.evaluation(4, 2, seed)
        c = coefficients("dr_grpo", torch.tensor([1.0, -1.0] * 4), batch.completion_mask, max_completion_length=2)
        drawn.append(batch._replace(coefficients=c))
    return drawn


@pytest.fixture(scope="module")
def trained(policy: Policy, batches: list[Batch]) -> tuple[Any, torch.optim.AdamW]:
    """Return a model in float64 after two steps of AdamW, and the optimizer."""
    optimizer = fresh_optimizer(policy.model, LR)
    in_float64(policy.model, optimizer)
    for batch in batches[:2]:
        reinforce(policy.model, optimizer, batch)
    return policy.model, optimizer


def test_replay_is_the_librarys(trained: tuple[Any, torch.optim.AdamW], batches: list[Batch]) -> None:
    apply, params = fx.make_functional(trained[0])
    before = {name: p.clone() for name, p in params.items()}
    changed = [without_row(batches[0], 3), *batches[1:]]
    after = replayed(*trained, changed, (1, 3))
    state = fx.adamw_state(trained[1], trained[0])
    # transformers computes RMSNorm in float32 whatever the dtype; a step of AdamW is of the size of its rate.
    bound = rounding_bound(torch.float32, TINY_POLICY, len(changed) * LR)
    for steps, result in zip((1, 3), after, strict=True):
        expected = params_after(recorded_window(changed[:steps], LR, params, state), apply)
        for name, p in expected.items():
            assert_within(result[name], p, bound)
            assert torch.equal(params[name], before[name])
    [with_row] = replayed(*trained, batches, (1,))
    assert max(float((with_row[name] - p).abs().max()) for name, p in after[0].items()) > bound


def test_share_before_the_window_is_one_steps(trained: tuple[Any, torch.optim.AdamW], batches: list[Batch]) -> None:
    """It is the frozen influence of the step where the gradient is taken before it."""
    apply, params = fx.make_functional(trained[0])
    state, batch, e = fx.adamw_state(trained[1], trained[0]), batches[0], batches[2]._replace(coefficients=None)
    step = Step(params, apply, state, batch, torch.zeros(8), rollout_gradients(params, batch, apply))
    expected = fx.influence(params, batch, e, state, apply=apply, max_grad_norm=MAX_NORM, stderr=False).per_sequence
    share = share_at_end(step, params, e, fx.Entropy())
    assert_within(share, expected, rounding_bound(torch.float64, TINY_POLICY) * float(expected.abs().max()))


def test_steps_share_the_groups_with_advantages() -> None:
    rollout = Rollout("", "", 0, "", "", (), (1,), True)
    advantages = [0.0, 1.0, 0.0, -1.0]
    rollouts = [dataclasses.replace(rollout, group=k // 2, advantage=advantages[k // 2]) for k in range(8)]
    assert rows_by_step(rollouts, 2) == [[2, 3, 0, 1], [6, 7, 4, 5]]
