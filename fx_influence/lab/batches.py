"""The rollouts of a run: prompts chosen, completions sampled or read back, checked to be the policy's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fx_influence.interop.checkpoint import load_checkpoint
from fx_influence.interop.prompts import Prompt, read_prompts
from fx_influence.interop.rewards import Reward, resolve_reward
from fx_influence.interop.rollouts import Rollout, collate
from fx_influence.interop.sampling import check_on_policy, sample_rewarded
from fx_influence.lab.plan import EntropyInfluencePlan, PlanError, SampledBatch, demo_path
from fx_influence.lab.store import RunDirectory
from fx_influence.logprobs import TokenValues, all_token_values
from fx_influence.losses import coefficients
from fx_influence.policy import Policy, functionalize
from fx_influence.types import AdamWState, Batch, Params

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, in all)."""

ON_POLICY_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.3}
"""Largest |behaviour - scored| log-probability: cached generation and scoring round differently, in half much more."""


class State(NamedTuple):
    """A training state ready to be measured, with the prompts of U and of each E, and the reward."""

    model: Any
    tokenizer: Any
    apply: Policy
    params: Params
    opt_state: AdamWState
    prompts: list[list[Prompt]]
    reward: Reward


class Sampled(NamedTuple):
    """Rollouts, their batch and scores at theta, and how far those are from the log-probs they were drawn with."""

    rollouts: list[Rollout]
    batch: Batch
    values: TokenValues
    off_policy: float


def load_state(plan: EntropyInfluencePlan) -> State:
    """What the plan names, read and checked, the cheap first. Raises ``PlanError`` and the readers' own errors."""
    prompts = [_prompts(request) for request in (plan.update, *plan.evaluations)]
    reward = resolve_reward(plan.reward)
    dtype = None if plan.dtype == "auto" else getattr(torch, plan.dtype)
    base = None if plan.base is None else demo_path(plan.base)
    checkpoint = load_checkpoint(demo_path(plan.checkpoint), base=base, dtype=dtype, device=plan.device)
    if checkpoint.optimizer_state is None:
        raise PlanError(f"checkpoint {plan.checkpoint!r} has no optimizer state; save optimizer.pt beside the model")
    apply, params = functionalize(checkpoint.model)
    return State(checkpoint.model, checkpoint.tokenizer, apply, params, checkpoint.optimizer_state, prompts, reward)


def sampled(
    plan: EntropyInfluencePlan, state: State, directory: RunDirectory, index: int, name: str, progress: Progress
) -> Sampled:
    """The rollouts of U (``index`` 0) or of an E, read from the directory's ``name`` or sampled and stored there."""
    request = (plan.update, *plan.evaluations)[index]
    if directory.has(name):
        rollouts = directory.read_rollouts(name)
    else:
        seed = _seed(plan.seed, index)
        rollouts = sample_rewarded(
            state.model,
            state.tokenizer,
            _chosen(state.prompts[index], request.num_prompts, seed),
            state.reward,
            completions_per_prompt=request.completions_per_prompt,
            max_new_tokens=plan.max_new_tokens,
            temperature=plan.temperature,
            seed=seed,
            resample_zero_advantage=request.resample_zero_advantage,
            scale_advantages=plan.scale_advantages,
            progress=lambda done, total: progress("sampling U" if index == 0 else "sampling E", done, total),
        )
        directory.write_rollouts(name, rollouts)
    pad = state.tokenizer.pad_token_id
    batch = collate(rollouts, state.tokenizer.eos_token_id if pad is None else pad)
    batch = Batch._make(None if field is None else field.to(plan.device) for field in batch)
    values = all_token_values(state.params, batch, state.apply, plan.temperature)
    tolerance = ON_POLICY_TOLERANCE[next(state.model.parameters()).dtype]
    return Sampled(rollouts, batch, values, check_on_policy(rollouts, values.logprobs, batch, tolerance))


def update_batch(plan: EntropyInfluencePlan, u: Sampled) -> Batch:
    """U with the coefficients of the plan's loss. Raises ``PlanError`` where no rollout has an advantage."""
    advantages = torch.tensor([r.advantage or 0.0 for r in u.rollouts], device=u.batch.input_ids.device)
    if not advantages.any():
        raise PlanError(
            "every advantage in U is 0, so its rollouts make no update; choose prompts that are sometimes solved and "
            "sometimes not, more completions_per_prompt, or update.resample_zero_advantage"
        )
    c = coefficients(plan.loss, advantages, u.batch.completion_mask, u.batch.group, plan.max_new_tokens)
    return u.batch._replace(coefficients=c)


def _prompts(request: SampledBatch) -> list[Prompt]:
    prompts = read_prompts(demo_path(request.prompts))
    if request.num_prompts is not None and request.num_prompts > len(prompts):
        raise PlanError(
            f"num_prompts is {request.num_prompts} but {request.prompts!r} holds {len(prompts)}; ask for fewer"
        )
    return prompts


def _chosen(prompts: Sequence[Prompt], count: int | None, seed: int) -> list[Prompt]:
    return list(prompts) if count is None else random.Random(seed).sample(list(prompts), count)


def _seed(seed: int, index: int) -> int:
    return random.Random(f"{seed}/{index}").getrandbits(63)
