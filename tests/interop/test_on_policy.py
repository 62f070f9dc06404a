"""The check that rollouts were sampled from the policy that scores them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers.sampling_models import (
    OPTIONS,
    PROMPTS,
    gap,
    make_model,
    make_tokenizer,
)

from fx_influence.interop.on_policy import check_on_policy
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.sampling import sample


def test_check_on_policy_refuses_changed_model() -> None:
    model = make_model()
    rollouts = sample(model, make_tokenizer(), PROMPTS, **OPTIONS)
    with torch.no_grad():
        next(model.parameters()).mul_(1.05)
    worst = gap(model, rollouts, tolerance=math.inf)
    assert worst > 1e-3
    assert gap(model, rollouts, tolerance=worst) == worst
    with pytest.raises(ValueError, match=r"rollout '[abc]/\d' was not sampled .*expected at most 0.001. Sample again"):
        gap(model, rollouts, tolerance=1e-3)


def test_check_on_policy_names_worst_rollout() -> None:
    rollouts = [
        Rollout("a/0", "a", 0, "", "", (2,), (3, 4), False, (-1.0, -2.0)),
        Rollout("b/0", "b", 1, "", "", (2, 3), (4,), False, (-3.0,)),
    ]
    batch = collate(rollouts, 0)
    logp = torch.tensor([[9.0, -1.25, -2.0], [9.0, 9.0, -3.5]])
    assert check_on_policy(rollouts, logp, batch, 0.5) == 0.5
    with pytest.raises(ValueError, match=r"rollout 'b/0' was not .* differ by 0.5; expected at most 0.4"):
        check_on_policy(rollouts, logp, batch, 0.4)
    with pytest.raises(ValueError, match="differ by inf"):
        check_on_policy(rollouts, logp.masked_fill(logp == -1.25, math.nan), batch, 0.5)
    with pytest.raises(
        ValueError, match=r"scored_logprobs has shape \(2, 2\); expected .* \(2, 3\), a row for each of 2"
    ):
        check_on_policy(rollouts, logp[:, 1:], batch, 0.5)
    with pytest.raises(ValueError, match="has 2 completion tokens for rollout 'b/0'; expected 1"):
        check_on_policy(rollouts[::-1], logp, batch, 0.5)


def test_check_on_policy_is_nan_without_behaviour_logprobs() -> None:
    rollouts = [Rollout("0/0", "0", 0, "", "", (1,), (2, 3), True), Rollout("1/0", "1", 1, "", "", (1,), (2, 3), True)]
    scored = torch.full((2, 3), -1.0)
    assert math.isnan(check_on_policy(rollouts, scored, collate(rollouts, 0), 1e-3))
    known = dataclasses.replace(rollouts[1], behaviour_logprobs=(-9.0, -1.0), completion_mask=(False, True))
    assert check_on_policy([rollouts[0], known], scored, collate([rollouts[0], known], 0), 1e-3) == 0.0
