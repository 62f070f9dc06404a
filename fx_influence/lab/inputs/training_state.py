"""Load and check."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from fx_influence.core.display import record_line
from fx_influence.core.tree import promote
from fx_influence.functional import make_functional
from fx_influence.interop.checkpoints.load import load_checkpoint, load_tokenizer
from fx_influence.interop.prompts import Prompt, as_conversations, make_prompts, read_prompts
from fx_influence.interop.rewards import Reward
from fx_influence.interop.rollouts.read import read_rollouts
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.job import SINGLE_PROCESS, Job
from fx_influence.interop.runtime.run_files import sha256
from fx_influence.interop.sampling import tokenize_prompts
from fx_influence.interop.scoring import check_columns, check_reward, resolve_reward
from fx_influence.lab.plan.batch_request import BatchRequest, CustomSequence, RolloutFile, SampledBatch
from fx_influence.lab.plan.demo import demo_path
from fx_influence.lab.plan.errors import PlanError
from fx_influence.lab.plan import StepPlan
from fx_influence.losses import group_advantages
from fx_influence.policy.policy import Policy
from fx_influence.types import AdamWState, LossType, Params


class Source(NamedTuple):
    """What a request starts from: prompts to be sampled, or rollouts."""

    prompts: list[Prompt]
    rollouts: list[Rollout]

    def __repr__(self) -> str:
        return record_line(self)


class TrainingState(NamedTuple):
    """A training state ready to be measured, what U and each E start from, the reward, and who measures."""

    model: Any
    tokenizer: Any
    apply: Policy
    params: Params
    opt_state: AdamWState
    sources: list[Source]
    reward: Reward | None
    job: Job

    def __repr__(self) -> str:
        return record_line(self)


def load_state(plan: StepPlan, job: Job = SINGLE_PROCESS) -> TrainingState:
    """What the plan names, read and checked, the cheap first. Raises ``PlanError`` and the readers' own errors."""
    from fx_influence.lab.inputs.rollouts import _written_out

    sources = [_source(plan, request) for request in plan.requests()]
    _check_loss(plan, sources[0].rollouts)
    reward = None if plan.reward is None else resolve_reward(plan.reward)
    for prompts in (source.prompts for source in sources if source.prompts):
        assert reward is not None
        # Those of one batch all have the same columns.
        check_reward(reward, prompts[0].columns)
        check_columns(reward, {prompt.id: prompt.columns for prompt in prompts})
    dtype = None if plan.dtype == "auto" else getattr(torch, plan.dtype)
    base = None if plan.base is None else demo_path(plan.base)
    _check_device(plan.device, job)
    checkpoint = load_checkpoint(demo_path(plan.checkpoint), base=base, dtype=dtype, device=plan.device)
    if checkpoint.optimizer_state is None:
        raise PlanError(f"checkpoint {plan.checkpoint!r} has no optimizer state; save optimizer.pt beside the model")
    # Half precision rounds what a finite step and a single rollout change: the same weights, computed with in float32.
    model = checkpoint.model if plan.dtype == "float64" else checkpoint.model.float()
    opt_state = _widened(checkpoint.optimizer_state)
    apply, params = make_functional(model)
    state = TrainingState(model, checkpoint.tokenizer, apply, params, opt_state, sources, reward, job)
    for request, source in zip(plan.requests(), sources, strict=True):
        if isinstance(request, SampledBatch):
            tokenize_prompts(state.model, state.tokenizer, source.prompts, plan.max_new_tokens)
        elif isinstance(request, CustomSequence):
            _written_out(plan, state, request)
        else:
            _check_tokens(request, source.rollouts, state)
    return state


def input_sums(plan: StepPlan) -> dict[str, str]:
    """SHA-256 by name of the files that ``plan`` reads: those of the checkpoint and its base, prompts and rollouts."""
    folders = {"checkpoint": plan.checkpoint} | ({} if plan.base is None else {"base": plan.base})
    files = {
        f"{name}/{file.relative_to(demo_path(folder))}": file
        for name, folder in folders.items()
        for file in sorted(Path(demo_path(folder)).rglob("*"))
        if file.is_file()
    }
    names = ["update", *(f"evaluations[{i}]" for i in range(len(plan.evaluations)))]
    for name, request in zip(names, plan.requests(), strict=True):
        if isinstance(request, RolloutFile):
            files[f"{name}.rollouts"] = Path(request.rollouts)
        elif isinstance(request, SampledBatch) and isinstance(request.prompts, str):
            files[f"{name}.prompts"] = Path(demo_path(request.prompts))
    return {name: sha256(file) for name, file in files.items()}


def reference_lr(state: TrainingState) -> float:
    """The learning rate that etas are multiples of; 1e-6 where a saved schedule stands at 0."""
    return state.opt_state.lr or 1e-6


def _source(plan: StepPlan, request: BatchRequest) -> Source:
    if isinstance(request, CustomSequence):
        return Source([], [])
    if isinstance(request, RolloutFile):
        return Source([], _from_file(plan, request.rollouts, update=request is plan.update))
    named = request.prompts if isinstance(request.prompts, str) else "prompts"
    prompts = (
        read_prompts(demo_path(request.prompts)) if isinstance(request.prompts, str) else make_prompts(request.prompts)
    )
    prompts = as_conversations(prompts, request.chat, request.system)
    if request.prompt_ids is not None:
        if len(set(request.prompt_ids)) < len(request.prompt_ids):
            raise PlanError(f"prompt_ids is {list(request.prompt_ids)}, with an id twice; name each prompt once")
        by_id = {prompt.id: prompt for prompt in prompts}
        for name in request.prompt_ids:
            if name not in by_id:
                raise PlanError(f"prompt_ids has {name!r}, which is not among the {len(prompts)} ids of {named!r}")
        prompts = [by_id[name] for name in request.prompt_ids]
    if request.num_prompts is not None and request.num_prompts > len(prompts):
        raise PlanError(f"num_prompts is {request.num_prompts} but {named!r} holds {len(prompts)}; ask for fewer")
    # A reward function is called once a piece: whichever prompts are in it, the columns are those of all.
    columns = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return Source([dataclasses.replace(p, columns={**columns, **p.columns}) for p in prompts], [])


def _check_loss(plan: StepPlan, rollouts: Sequence[Rollout]) -> None:
    """Refuse a plan without a loss whose rollouts of U do not all have the coefficients of theirs."""
    if plan.loss is None and any(r.coefficients is None for r in rollouts):
        raise PlanError(
            "loss is missing; expected the training's, since the rollouts of update have no coefficients of their own. "
            f"Add loss: {' | '.join(get_args(LossType))}"
        )


def _from_file(plan: StepPlan, path: str, update: bool) -> list[Rollout]:
    base = None if plan.base is None else demo_path(plan.base)
    rollouts = read_rollouts(
        path,
        load_tokenizer(demo_path(plan.checkpoint), base=base),
        scale=plan.scale_advantages,
        max_completion_length=plan.max_new_tokens,
    )
    if not update or all(r.advantage is not None for r in rollouts):
        return rollouts
    wanting = {r.group for r in rollouts if r.advantage is None}
    for r in rollouts:
        if r.group in wanting and r.reward is None:
            raise PlanError(f"rollout {r.id!r} of {path!r} has no reward, which group {r.group} lacks advantages for")
    rewards = torch.tensor([r.reward or 0.0 for r in rollouts], dtype=torch.float64)
    group = torch.tensor([r.group for r in rollouts])
    advantages = group_advantages(rewards, group, scale=plan.scale_advantages).tolist()
    return [
        r if r.advantage is not None else dataclasses.replace(r, advantage=advantage)
        for r, advantage in zip(rollouts, advantages, strict=True)
    ]


def _check_tokens(request: RolloutFile, rollouts: Sequence[Rollout], state: TrainingState) -> None:
    size = state.apply.vocab_size
    for r in rollouts:
        worst = max((*r.prompt_ids, *r.completion_ids), default=0)
        if size is not None and (worst >= size or min((*r.prompt_ids, *r.completion_ids), default=0) < 0):
            raise PlanError(
                f"rollout {r.id!r} of {request.rollouts!r} has token {worst}, the model {size}; take the rollouts of "
                "this checkpoint"
            )


def _check_device(device: str, job: Job) -> None:
    try:
        if job.size > 1 and device == "cuda":
            torch.cuda.set_device(job.local_rank % max(1, torch.cuda.device_count()))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise PlanError(
            f"device is {device!r}, which cannot be used here ({error}); use cpu, or cuda with a GPU"
        ) from error


def _widened(state: AdamWState) -> AdamWState:
    def wide(values: Params) -> Params:
        return {name: x.to(promote(x.dtype)) for name, x in values.items()}

    return state._replace(
        exp_avg=wide(state.exp_avg), exp_avg_sq=wide(state.exp_avg_sq), max_exp_avg_sq=wide(state.max_exp_avg_sq)
    )
