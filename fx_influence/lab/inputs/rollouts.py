"""Make the rollouts of U and of every E: sample, tokenize or read them, and score them by the policy."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import NamedTuple

from fx_influence.autodiff.token_values import all_token_values
from fx_influence.core.display import record_line
from fx_influence.interop.generation import eos_token_ids
from fx_influence.interop.on_policy import check_on_policy
from fx_influence.interop.prompts import Prompt
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.job import SINGLE_PROCESS, Job
from fx_influence.interop.runtime.run_files import raise_if_damaged
from fx_influence.interop.sampling import sample_rewarded, tokenize_prompts
from fx_influence.lab.inputs.training_state import TrainingState, load_training_state
from fx_influence.lab.plan import CustomSequence, PlanError, RolloutFile, SampledBatch, StepPlan
from fx_influence.lab.store import RunDirectory
from fx_influence.types import Batch, TokenValues

Progress = Callable[[str, int, int], None]
"""Function called with the phase, the number of its tasks that are done, and the number of all."""

ROLLOUTS_PER_TASK = 64
"""Number of rollouts that are sampled, rewarded and stored together."""

ON_POLICY_TOLERANCE = 1e-3
"""Largest |behaviour - scored| log-probability: cached generation and scoring round differently."""


class ScoredRollouts(NamedTuple):
    """The rollouts of one batch with the policy's scores of them.

    Attributes:
        rollouts: records in the order of the batch.
        batch: the same as padded tensors, (n, T).
        values: log-probabilities and entropies at theta.
        off_policy: largest |behaviour - scored| log-probability, nats; NaN where no behaviour was recorded.
    """

    rollouts: list[Rollout]
    batch: Batch
    values: TokenValues
    off_policy: float

    def __repr__(self) -> str:
        return record_line(self)


def load_state(plan: StepPlan, job: Job = SINGLE_PROCESS) -> TrainingState:
    """Return the plan's training state, after checking that the policy can sample or score each of its batches.

    Raises:
        PlanError: where it cannot; and the errors of ``load_training_state``.
    """
    state = load_training_state(plan, job)
    for request, source in zip(plan.requests(), state.sources, strict=True):
        if isinstance(request, SampledBatch):
            tokenize_prompts(state.model, state.tokenizer, source.prompts, plan.max_new_tokens)
        elif isinstance(request, CustomSequence):
            _custom_rollout(plan, state, request)
        else:
            _check_vocabulary(request, source.rollouts, state)
    return state


def load_rollouts(
    plan: StepPlan, state: TrainingState, directory: RunDirectory, index: int, name: str, progress: Progress
) -> ScoredRollouts:
    """Return the rollouts of one batch, read from the run directory, or made and stored there.

    Args:
        plan: says how the batch is made.
        state: the training state that samples and scores.
        directory: of the run; rollouts that are stored there are not sampled again.
        index: 0 for U, i + 1 for evaluation i.
        name: file that the rollouts are stored in.
        progress: called as rollouts are sampled.

    Raises:
        ValueError: where E was not sampled from this policy.
    """
    request, source = plan.requests()[index], state.sources[index]
    stored = directory.partial_rollouts(name.removesuffix(".jsonl"))
    if directory.has(name):
        with raise_if_damaged(directory.path / name):
            rollouts = directory.read_rollouts(name)
    else:
        if isinstance(request, RolloutFile):
            rollouts = source.rollouts
        elif isinstance(request, CustomSequence):
            rollouts = [_custom_rollout(plan, state, request)]
        else:
            phase = "sampling U" if index == 0 else "sampling E"
            seed = _derived_seed(plan.seed, index) if request.seed is None else request.seed
            rollouts = _sample(plan, state, request, source.prompts, seed, stored, partial(progress, phase))
        directory.write_rollouts(name, rollouts)
    stored.clear()
    batch, values = _score(plan, state, rollouts)
    # A file may hold U of an older policy, as in a trainer's later passes over a batch: its loss then has ratios, or
    # the rollouts have coefficients.
    may_be_off_policy = index == 0 and isinstance(request, RolloutFile)
    tolerance = math.inf if may_be_off_policy else ON_POLICY_TOLERANCE
    return ScoredRollouts(rollouts, batch, values, check_on_policy(rollouts, values.logprobs, batch, tolerance))


def mean_reward(rollouts: Sequence[Rollout]) -> float | None:
    """Return the mean over the rollouts that have a reward, None where none has."""
    rewards = [r.reward for r in rollouts if r.reward is not None]
    return sum(rewards) / len(rewards) if rewards else None


def _check_vocabulary(request: RolloutFile, rollouts: Sequence[Rollout], state: TrainingState) -> None:
    size = state.apply.vocab_size
    for r in rollouts:
        largest = max((*r.prompt_ids, *r.completion_ids), default=0)
        if size is not None and (largest >= size or min((*r.prompt_ids, *r.completion_ids), default=0) < 0):
            raise PlanError(
                f"rollout {r.id!r} of {request.rollouts!r} has token {largest}; expected ids below {size}, the "
                "model's vocabulary. Take the rollouts of this checkpoint"
            )


def _custom_rollout(plan: StepPlan, state: TrainingState, request: CustomSequence) -> Rollout:
    """Return a sequence written out as a rollout, with the policy's log-probabilities as those of its sampling."""
    ids = tuple(state.tokenizer(request.completion, add_special_tokens=False)["input_ids"])
    ids += (eos_token_ids(state.model, state.tokenizer)[0],) if request.end else ()
    if not ids:
        raise PlanError(
            f"completion is {request.completion!r}, which has no tokens; expected at least one. Write it, or set end"
        )
    prompt_ids = tokenize_prompts(state.model, state.tokenizer, [Prompt("0", request.prompt)], len(ids))[0]
    rollout = Rollout(
        id="0/0",
        prompt_id="0",
        group=0,
        prompt=request.prompt,
        completion=request.completion,
        prompt_ids=prompt_ids,
        completion_ids=ids,
        finished=request.end,
        behaviour_logprobs=(0.0,) * len(ids),
        advantage=request.advantage,
    )
    batch, values = _score(plan, state, [rollout])
    return dataclasses.replace(rollout, behaviour_logprobs=tuple(values.logprobs[batch.completion_mask].tolist()))


def _sample(
    plan: StepPlan,
    state: TrainingState,
    request: SampledBatch,
    prompts: Sequence[Prompt],
    seed: int,
    stored: MutableMapping[int, Sequence[Rollout]],
    progress: Callable[[int, int], None],
) -> list[Rollout]:
    """Return sampled rollouts with rewards; the processes of the job share the tasks, and stored ones are not redone.

    Args:
        plan: has the settings of sampling.
        state: the policy, the reward and the job.
        request: says which prompts, and how many completions of each.
        prompts: to choose from.
        seed: of the choice of prompts and of every task.
        stored: rollouts of finished tasks by number; those of each further task are stored there.
        progress: called with the number of rollouts sampled so far, and of all.
    """
    if request.num_prompts is not None:
        prompts = random.Random(seed).sample(list(prompts), request.num_prompts)
    completions = request.completions_per_prompt
    prompts_per_task = max(1, ROLLOUTS_PER_TASK // completions)

    reward = state.reward
    assert reward is not None

    def sample_task(k: int) -> Sequence[Rollout]:
        rollouts = sample_rewarded(
            state.model,
            state.tokenizer,
            prompts[k * prompts_per_task : (k + 1) * prompts_per_task],
            reward,
            completions_per_prompt=completions,
            max_new_tokens=plan.max_new_tokens,
            temperature=plan.temperature,
            seed=_derived_seed(seed, k),
            resample_zero_advantage=request.resample_zero_advantage,
            scale_advantages=plan.scale_advantages,
        )
        return [dataclasses.replace(r, group=r.group + k * prompts_per_task) for r in rollouts]

    tasks = [partial(sample_task, k) for k in range(math.ceil(len(prompts) / prompts_per_task))]
    all_rollouts = len(prompts) * completions
    sampled = state.job.map_tasks(
        tasks, stored, lambda done: progress(min(done * prompts_per_task * completions, all_rollouts), all_rollouts)
    )
    return [rollout for rollouts in sampled for rollout in rollouts]


def _score(plan: StepPlan, state: TrainingState, rollouts: list[Rollout]) -> tuple[Batch, TokenValues]:
    pad = state.tokenizer.pad_token_id
    batch = collate(rollouts, state.tokenizer.eos_token_id if pad is None else pad, plan.device)
    return batch, all_token_values(state.params, batch, state.apply, plan.temperature, plan.chunk_size)


def _derived_seed(seed: int, index: int) -> int:
    return random.Random(f"{seed}/{index}").getrandbits(63)
