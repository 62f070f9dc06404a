"""Load the training state that a plan names: policy, optimizer state, and the sources of its batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from fx_influence.core.display import record_line
from fx_influence.core.tree import promote
from fx_influence.functional import make_functional
from fx_influence.interop.checkpoints.load import load_checkpoint
from fx_influence.interop.rewards import Reward
from fx_influence.interop.runtime.job import SINGLE_PROCESS, Job
from fx_influence.interop.runtime.run_files import sha256
from fx_influence.lab.inputs.sources import Source, load_reward, read_sources
from fx_influence.lab.plan import PlanError, RolloutFile, SampledBatch, StepPlan, demo_path
from fx_influence.policy.policy import Policy
from fx_influence.types import AdamWState, Params


class TrainingState(NamedTuple):
    """A training state ready to be measured.

    Attributes:
        model: as loaded, for sampling.
        tokenizer: the checkpoint's.
        apply: the policy as a function of its parameters.
        params: trainable parameters by name.
        opt_state: AdamW's state, at least float32.
        sources: prompts or rollouts of U and each E, in the order of ``plan.requests()``.
        reward: the plan's reward function, None without one.
        job: the processes that share the work.
    """

    model: Any
    tokenizer: Any
    apply: Policy
    params: Params
    opt_state: AdamWState
    sources: list[Source]
    reward: Reward | None
    job: Job

    @property
    def reference_lr(self) -> float:
        """Return the learning rate that etas are multiples of; 1e-6 if the saved schedule is at 0."""
        return self.opt_state.lr or 1e-6

    def __repr__(self) -> str:
        return record_line(self)


def load_training_state(plan: StepPlan, job: Job = SINGLE_PROCESS) -> TrainingState:
    """Return the training state of a plan, its files read and checked in the order of their cost.

    Args:
        plan: names the checkpoint, the batches and the reward.
        job: the processes that share the work.

    Raises:
        PlanError: where the files do not hold what the plan asks for.
        ValueError, OSError, ImportError, RewardError: of the readers of checkpoints, prompts, rollouts and rewards.
    """
    sources = read_sources(plan)
    reward = load_reward(plan, sources)
    dtype = None if plan.dtype == "auto" else getattr(torch, plan.dtype)
    base = None if plan.base is None else demo_path(plan.base)
    _check_device(plan.device, job)
    checkpoint = load_checkpoint(demo_path(plan.checkpoint), base=base, dtype=dtype, device=plan.device)
    if checkpoint.optimizer_state is None:
        raise PlanError(
            f"checkpoint {plan.checkpoint!r} has no optimizer state; expected optimizer.pt beside the model. Save "
            "it there"
        )
    # In half precision the change by a finite step or a single rollout would be lost in rounding, so the same weights
    # are computed with in float32.
    model = checkpoint.model if plan.dtype == "float64" else checkpoint.model.float()
    opt_state = _at_least_float32(checkpoint.optimizer_state)
    apply, params = make_functional(model)
    return TrainingState(model, checkpoint.tokenizer, apply, params, opt_state, sources, reward, job)


def input_hashes(plan: StepPlan) -> dict[str, str]:
    """Return the SHA-256 of every file that ``plan`` reads, by name: checkpoint, base, prompts and rollouts."""
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


def _check_device(device: str, job: Job) -> None:
    try:
        if job.size > 1 and device == "cuda":
            torch.cuda.set_device(job.local_rank % max(1, torch.cuda.device_count()))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise PlanError(
            f"device is {device!r}, which cannot be used here ({error}); expected cpu, or cuda with a GPU"
        ) from error


def _at_least_float32(state: AdamWState) -> AdamWState:
    def raised(moments: Params) -> Params:
        return {name: x.to(promote(x.dtype)) for name, x in moments.items()}

    return state._replace(
        exp_avg=raised(state.exp_avg), exp_avg_sq=raised(state.exp_avg_sq), max_exp_avg_sq=raised(state.max_exp_avg_sq)
    )
