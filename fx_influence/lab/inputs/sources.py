"""Read the prompts or rollouts that a plan's batches start from, before any model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch

from fx_influence.core.display import record_line
from fx_influence.interop.checkpoints.load import load_tokenizer
from fx_influence.interop.prompts import Prompt, as_conversations, make_prompts, read_prompts
from fx_influence.interop.rewards import Reward
from fx_influence.interop.rollouts.read import read_rollouts
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.scoring import check_columns, check_reward, resolve_reward
from fx_influence.lab.plan import (
    BatchRequest,
    CustomSequence,
    PlanError,
    RolloutFile,
    SampledBatch,
    StepPlan,
    demo_path,
)
from fx_influence.losses import group_advantages
from fx_influence.types import LossType


class Source(NamedTuple):
    """Prompts to be sampled, or rollouts, that a batch request starts from; neither for a sequence written out."""

    prompts: list[Prompt]
    rollouts: list[Rollout]

    def __repr__(self) -> str:
        return record_line(self)


def read_sources(plan: StepPlan) -> list[Source]:
    """Return the prompts or rollouts that U and each E start from, in the order of ``plan.requests()``.

    Raises:
        PlanError: where the files do not hold what the plan asks for.
        ValueError, OSError: of the readers of prompts and rollouts.
    """
    sources = [_read_source(plan, request) for request in plan.requests()]
    if plan.loss is None and any(r.coefficients is None for r in sources[0].rollouts):
        raise PlanError(
            "loss is missing; expected the training run's, since not all rollouts of update have coefficients. "
            f"Add loss: {' | '.join(get_args(LossType))}"
        )
    return sources


def load_reward(plan: StepPlan, sources: Sequence[Source]) -> Reward | None:
    """Return the plan's reward function, None without one, after checking that all prompts have the columns it needs.

    Raises:
        RewardError, ValueError, ImportError: of ``interop.scoring``.
    """
    reward = None if plan.reward is None else resolve_reward(plan.reward)
    for prompts in (source.prompts for source in sources if source.prompts):
        assert reward is not None
        # All prompts of one batch have the same columns, so the first stands for them.
        check_reward(reward, prompts[0].columns)
        check_columns(reward, {prompt.id: prompt.columns for prompt in prompts})
    return reward


def _read_source(plan: StepPlan, request: BatchRequest) -> Source:
    if isinstance(request, CustomSequence):
        return Source([], [])
    if isinstance(request, RolloutFile):
        rollouts = _read_rollout_file(plan, request.rollouts)
        is_update = request is plan.update
        return Source([], _with_advantages(plan, request.rollouts, rollouts) if is_update else rollouts)
    return Source(_read_prompts(request), [])


def _read_prompts(request: SampledBatch) -> list[Prompt]:
    """Return the prompts of a request, each with the columns of all; only those with the given ids, if it names ids."""
    file = request.prompts if isinstance(request.prompts, str) else "prompts"
    prompts = (
        read_prompts(demo_path(request.prompts)) if isinstance(request.prompts, str) else make_prompts(request.prompts)
    )
    prompts = as_conversations(prompts, request.chat, request.system)
    if request.prompt_ids is not None:
        if len(set(request.prompt_ids)) < len(request.prompt_ids):
            raise PlanError(f"prompt_ids is {list(request.prompt_ids)}; expected each prompt once")
        by_id = {prompt.id: prompt for prompt in prompts}
        for name in request.prompt_ids:
            if name not in by_id:
                raise PlanError(f"prompt_ids has {name!r}; expected one of the {len(prompts)} ids of {file!r}")
        prompts = [by_id[name] for name in request.prompt_ids]
    if request.num_prompts is not None and request.num_prompts > len(prompts):
        raise PlanError(
            f"num_prompts is {request.num_prompts}; expected at most {len(prompts)}, as {file!r} holds. Ask for fewer"
        )
    # A reward function is called once per task, and must get the same columns whichever prompts the task has.
    columns = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return [dataclasses.replace(p, columns={**columns, **p.columns}) for p in prompts]


def _read_rollout_file(plan: StepPlan, path: str) -> list[Rollout]:
    base = None if plan.base is None else demo_path(plan.base)
    return read_rollouts(
        path,
        load_tokenizer(demo_path(plan.checkpoint), base=base),
        scale=plan.scale_advantages,
        max_completion_length=plan.max_new_tokens,
    )


def _with_advantages(plan: StepPlan, path: str, rollouts: list[Rollout]) -> list[Rollout]:
    """Return the rollouts with the group-relative advantage of their reward where they have none of their own."""
    incomplete = {r.group for r in rollouts if r.advantage is None}
    if not incomplete:
        return rollouts
    for r in rollouts:
        if r.group in incomplete and r.reward is None:
            raise PlanError(
                f"reward of rollout {r.id!r} of {path!r} is None; expected a number, since group {r.group} lacks "
                "advantages. Add rewards, or all advantages"
            )
    rewards = torch.tensor([r.reward or 0.0 for r in rollouts], dtype=torch.float64)
    group = torch.tensor([r.group for r in rollouts])
    advantages = group_advantages(rewards, group, scale=plan.scale_advantages).tolist()
    return [
        r if r.advantage is not None else dataclasses.replace(r, advantage=advantage)
        for r, advantage in zip(rollouts, advantages, strict=True)
    ]
