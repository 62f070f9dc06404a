"""The rollouts of a run: sampled a piece at a time, written out or read from a file, and checked to be the policy's."""

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
from fx_influence.interop.prompts import Prompt
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.run_files import raise_if_damaged
from fx_influence.interop.sampling import check_on_policy, sample_rewarded, tokenize_prompts
from fx_influence.lab.inputs.training_state import TrainingState
from fx_influence.lab.plan.batch_request import CustomSequence, RolloutFile, SampledBatch
from fx_influence.lab.plan.errors import PlanError
from fx_influence.lab.plan import StepPlan
from fx_influence.lab.store import RunDirectory
from fx_influence.types import Batch, TokenValues

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, in all)."""

ROLLOUTS_PER_PIECE = 64
"""Rollouts that are sampled, judged and stored together."""

ON_POLICY_TOLERANCE = 1e-3
"""Largest |behaviour - scored| log-probability: cached generation and scoring round differently."""


class ScoredRollouts(NamedTuple):
    """Rollouts, their batch and scores at theta, and how far those are from the log-probs they were drawn with."""

    rollouts: list[Rollout]
    batch: Batch
    values: TokenValues
    off_policy: float

    def __repr__(self) -> str:
        return record_line(self)


def load_rollouts(
    plan: StepPlan, state: TrainingState, directory: RunDirectory, index: int, name: str, progress: Progress
) -> ScoredRollouts:
    """The rollouts of U (``index`` 0) or of an E, read from the directory's ``name`` or made and stored there."""
    request, source = plan.requests()[index], state.sources[index]
    pieces = directory.rollout_pieces(name.removesuffix(".jsonl"))
    if directory.has(name):
        with raise_if_damaged(directory.path / name):
            rollouts = directory.read_rollouts(name)
    else:
        if isinstance(request, RolloutFile):
            rollouts = source.rollouts
        elif isinstance(request, CustomSequence):
            rollouts = [_written_out(plan, state, request)]
        else:
            phase = "sampling U" if index == 0 else "sampling E"
            seed = _seed(plan.seed, index) if request.seed is None else request.seed
            rollouts = _sampled(
                plan, state, request, source.prompts, seed, pieces, lambda *done: progress(phase, *done)
            )
        directory.write_rollouts(name, rollouts)
    pieces.clear()
    batch, values = _scored(plan, state, rollouts)
    # U may be of an older policy, as a trainer's later passes over a batch are: its loss has ratios, or coefficients.
    taken_as_it_is = index == 0 and isinstance(request, RolloutFile)
    tolerance = math.inf if taken_as_it_is else ON_POLICY_TOLERANCE
    return ScoredRollouts(rollouts, batch, values, check_on_policy(rollouts, values.logprobs, batch, tolerance))


def _written_out(plan: StepPlan, state: TrainingState, request: CustomSequence) -> Rollout:
    ids = tuple(state.tokenizer(request.completion, add_special_tokens=False)["input_ids"])
    ids += (eos_token_ids(state.model, state.tokenizer)[0],) if request.end else ()
    if not ids:
        raise PlanError(f"completion is {request.completion!r}, which has no tokens; write at least one, or set end")
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
    batch, values = _scored(plan, state, [rollout])
    return dataclasses.replace(rollout, behaviour_logprobs=tuple(values.logprobs[batch.completion_mask].tolist()))


def _sampled(
    plan: StepPlan,
    state: TrainingState,
    request: SampledBatch,
    prompts: Sequence[Prompt],
    seed: int,
    pieces: MutableMapping[int, Sequence[Rollout]],
    progress: Callable[[int, int], None],
) -> list[Rollout]:
    if request.num_prompts is not None:
        prompts = random.Random(seed).sample(list(prompts), request.num_prompts)
    each = request.completions_per_prompt
    step = max(1, ROLLOUTS_PER_PIECE // each)

    reward = state.reward
    assert reward is not None

    def piece(k: int) -> Sequence[Rollout]:
        drawn = sample_rewarded(
            state.model,
            state.tokenizer,
            prompts[k * step : (k + 1) * step],
            reward,
            completions_per_prompt=each,
            max_new_tokens=plan.max_new_tokens,
            temperature=plan.temperature,
            seed=_seed(seed, k),
            resample_zero_advantage=request.resample_zero_advantage,
            scale_advantages=plan.scale_advantages,
        )
        return [dataclasses.replace(r, group=r.group + k * step) for r in drawn]

    works = [partial(piece, k) for k in range(math.ceil(len(prompts) / step))]
    found = state.job.map_tasks(
        works, pieces, lambda done: progress(min(done * step, len(prompts)) * each, len(prompts) * each)
    )
    return [rollout for some in found for rollout in some]


def _scored(plan: StepPlan, state: TrainingState, rollouts: list[Rollout]) -> tuple[Batch, TokenValues]:
    pad = state.tokenizer.pad_token_id
    batch = collate(rollouts, state.tokenizer.eos_token_id if pad is None else pad, plan.device)
    return batch, all_token_values(state.params, batch, state.apply, plan.temperature, plan.chunk_size)


def _seed(seed: int, index: int) -> int:
    return random.Random(f"{seed}/{index}").getrandbits(63)
