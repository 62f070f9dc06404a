"""U's coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fx_influence.interop.rollouts.record import Rollout
from fx_influence.lab.inputs.rollouts import ON_POLICY_TOLERANCE, ScoredRollouts
from fx_influence.lab.plan.errors import PlanError
from fx_influence.lab.plan import StepPlan
from fx_influence.losses import clipped_ratio, coefficients
from fx_influence.types import Batch


def update_batch(plan: StepPlan, u: ScoredRollouts) -> Batch:
    """U with its rollouts' own coefficients, or else those of the plan's loss.

    Rollouts of an older policy enter the loss by their clipped ratio to it. Raises ``PlanError`` where no rollout has
    an advantage.
    """
    if u.batch.coefficients is not None:
        return u.batch
    advantages = torch.tensor([r.advantage or 0.0 for r in u.rollouts], device=u.batch.input_ids.device)
    if not advantages.any():
        rewards = {r.reward for r in u.rollouts}
        alike = f" (every reward is {next(iter(rewards))}: check that reward reads columns that the prompts have)"
        raise PlanError(
            f"every advantage in U is 0{alike if len(rewards) == 1 else ''}, so its rollouts make no update; choose "
            "prompts that are sometimes solved and sometimes not, more completions_per_prompt, or "
            "update.resample_zero_advantage"
        )
    ratio = None
    if u.off_policy > ON_POLICY_TOLERANCE:
        ratio = clipped_ratio(u.values.logprobs, _behaviour(u), advantages, *plan.clip_range)
    assert plan.loss is not None
    c = coefficients(plan.loss, advantages, u.batch.completion_mask, u.batch.group, plan.max_new_tokens, ratio)
    return u.batch._replace(coefficients=c)


def _behaviour(u: ScoredRollouts) -> torch.Tensor:
    """(n, T) log-probs of the policy that sampled; those of this one where nobody recorded them."""
    found = u.values.logprobs.clone()
    for row, rollout in zip(found, u.rollouts, strict=True):
        if rollout.behaviour_logprobs is not None:
            start = len(rollout.prompt_ids)
            recorded = torch.tensor(rollout.behaviour_logprobs, dtype=found.dtype)
            row[start : start + len(recorded)] = recorded.to(found.device)
    return found


def mean_reward(rollouts: Sequence[Rollout]) -> float | None:
    """Over the rollouts that were judged; None where none was."""
    known = [r.reward for r in rollouts if r.reward is not None]
    return sum(known) / len(known) if known else None
