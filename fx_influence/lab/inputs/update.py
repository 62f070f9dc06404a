"""Fill in the loss coefficients of the update batch U."""

from __future__ import annotations

import torch

from fx_influence.lab.inputs.rollouts import ON_POLICY_TOLERANCE, ScoredRollouts
from fx_influence.lab.plan import PlanError, StepPlan
from fx_influence.losses import clipped_ratio, coefficients
from fx_influence.types import Batch


def update_batch(plan: StepPlan, u: ScoredRollouts) -> Batch:
    """Return U with the coefficients of its rollouts, or else those of the plan's loss.

    Rollouts of an older policy enter the loss by their clipped ratio to it.

    Args:
        plan: has the loss and its settings.
        u: the rollouts of U, scored.

    Raises:
        PlanError: where no rollout has an advantage.
    """
    if u.batch.coefficients is not None:
        return u.batch
    advantages = torch.tensor([r.advantage or 0.0 for r in u.rollouts], device=u.batch.input_ids.device)
    if not advantages.any():
        rewards = {r.reward for r in u.rollouts}
        equal = f" (every reward is {next(iter(rewards))}: check that reward reads columns that the prompts have)"
        raise PlanError(
            f"every advantage in U is 0{equal if len(rewards) == 1 else ''}; expected some that are not, since "
            "these rollouts make no update. Choose prompts that are sometimes solved and sometimes not, more "
            "completions_per_prompt, or update.resample_zero_advantage"
        )
    ratio = None
    if u.off_policy > ON_POLICY_TOLERANCE:
        ratio = clipped_ratio(u.values.logprobs, _behaviour_logprobs(u), advantages, *plan.clip_range)
    assert plan.loss is not None
    c = coefficients(plan.loss, advantages, u.batch.completion_mask, u.batch.group, plan.max_new_tokens, ratio)
    return u.batch._replace(coefficients=c)


def _behaviour_logprobs(u: ScoredRollouts) -> torch.Tensor:
    """Return log-probabilities of the policy that sampled, (n, T); this policy's where none were recorded."""
    logprobs = u.values.logprobs.clone()
    for row, rollout in zip(logprobs, u.rollouts, strict=True):
        if rollout.behaviour_logprobs is not None:
            start = len(rollout.prompt_ids)
            recorded = torch.tensor(rollout.behaviour_logprobs, dtype=logprobs.dtype)
            row[start : start + len(recorded)] = recorded.to(logprobs.device)
    return logprobs
