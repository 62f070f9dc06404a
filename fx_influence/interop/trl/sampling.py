"""Sample held-out rollouts with a TRL trainer's own generation, leaving no trace in the training run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from fx_influence.interop.generation import LogprobRecorder, eval_mode, seeded_rng
from fx_influence.interop.live.guard import preserve_random_state
from fx_influence.interop.live.processes import all_gather_values, count_and_rank, local_slice
from fx_influence.interop.rollouts.record import Rollout

SEED_STRIDE = 0x9E3779B97F4A7C15
"""Distance between the seeds of two processes, so that no process repeats another's draws at a later step."""


class SampledCompletion(NamedTuple):
    """Token ids of a prompt and of one completion, and the log-probs it was sampled with, None where not known."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: tuple[float, ...] | None


def held_out_rollouts(
    trainer: Any, prompts: Sequence[Any], completions_per_prompt: int, seed: int, mesh: DeviceMesh | None = None
) -> list[Rollout]:
    """Sample completions of each prompt by the trainer's own generation in eval mode.

    The trainer's random state, training mode and metrics are restored afterwards.

    Args:
        trainer: a ``GRPOTrainer`` or ``RLOOTrainer``.
        prompts: texts, or conversations as lists of messages.
        completions_per_prompt: number of completions of each.
        seed: of this call; each process has its own seed made from it.
        mesh: of the trainer's processes, all of which make this call; each samples for its share of the prompts, and
            gets the rollouts of all.

    Returns:
        The rollouts prompt by prompt. ``group`` numbers the prompts; ``behaviour_logprobs`` are what the tokens were
        sampled with, NaN or None where they are not known.
    """
    local = prompts[local_slice(len(prompts), mesh)]
    processes, rank = count_and_rank(mesh)
    # A generation by a server must be as large on each process, so the last prompt is repeated and then dropped.
    padded = [*local, *[prompts[-1]] * (-(-len(prompts) // processes) - len(local))]
    with _restored(trainer, (seed + rank * SEED_STRIDE) % 2**63, completions_per_prompt):
        sampled = _sample(trainer, [prompt for prompt in padded for _ in range(completions_per_prompt)])
    by_process = all_gather_values(mesh, sampled[: len(local) * completions_per_prompt])
    return [
        rollout_record(
            trainer,
            *divmod(i, completions_per_prompt),
            completion.prompt_ids,
            completion.completion_ids,
            behaviour_logprobs=completion.logprobs,
        )
        for i, completion in enumerate(completion for completions in by_process for completion in completions)
    ]


def rollout_record(
    trainer: Any, group: int, k: int, prompt_ids: Sequence[int], completion_ids: Sequence[int], **fields: Any
) -> Rollout:
    """Return completion number ``k`` of prompt number ``group`` as a record.

    Args:
        trainer: has the tokenizer and the end-of-sequence tokens.
        group: number of the prompt.
        k: number of the completion among those of the prompt.
        prompt_ids: tokens of the prompt.
        completion_ids: tokens of the completion.
        **fields: further fields of the record.
    """
    tokenizer = trainer._tokenizer
    return Rollout(
        id=f"{group}/{k}",
        prompt_id=str(group),
        group=group,
        prompt=tokenizer.decode(prompt_ids),
        completion=tokenizer.decode(completion_ids, skip_special_tokens=True),
        prompt_ids=tuple(map(int, prompt_ids)),
        completion_ids=tuple(map(int, completion_ids)),
        finished=bool(completion_ids) and completion_ids[-1] in trainer.eos_token_ids,
        **fields,
    )


def generating_model(trainer: Any) -> Any:
    """Return the model whose ``generate`` a trainer calls, which is inside any adapters."""
    return trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model


def _sample(trainer: Any, prompts: list[Any]) -> list[SampledCompletion]:
    """Sample one completion for each prompt, in batches as large as the trainer's own."""
    group_size = trainer.num_generations_eval
    batch_size = trainer.args.generation_batch_size // trainer.accelerator.num_processes
    batch_size = max(1, batch_size // group_size) * group_size
    sampled: list[SampledCompletion] = []
    for start in range(0, len(prompts), batch_size):
        with _recording_logprobs(generating_model(trainer)) as recorders:
            prompt_ids, completion_ids, *more = trainer._generate(prompts[start : start + batch_size])
        # A server returns them, with None for a token that it could not score; RLOOTrainer returns none.
        returned = more[2] if len(more) > 2 else None
        logprobs = _recorded_logprobs(recorders, completion_ids) if returned is None else returned
        for ids, completion, values in zip(prompt_ids, completion_ids, logprobs or repeat(None), strict=False):
            known = None if values is None else tuple(math.nan if x is None else float(x) for x in values)
            sampled.append(SampledCompletion(ids, completion, known))
    return sampled


@contextmanager
def _recording_logprobs(model: Any) -> Iterator[list[LogprobRecorder]]:
    """Append a recorder to the logits processors of every call of ``generate`` inside, and yield the recorders."""
    recorders: list[LogprobRecorder] = []
    original = getattr(model, "_get_logits_processor", None)
    if original is None:
        yield recorders
        return

    def with_recorder(*args: Any, **kwargs: Any) -> Any:
        processors = original(*args, **kwargs)
        recorders.append(LogprobRecorder(1.0))
        processors.append(recorders[-1])
        return processors

    replaced = vars(model).get("_get_logits_processor")
    vars(model)["_get_logits_processor"] = with_recorder
    try:
        yield recorders
    finally:
        del vars(model)["_get_logits_processor"]
        if replaced is not None:
            vars(model)["_get_logits_processor"] = replaced


def _recorded_logprobs(recorders: list[LogprobRecorder], completion_ids: list[list[int]]) -> list[list[float]] | None:
    """Return the recorded log-probs of these completions, None unless one recorder has exactly them."""
    width = max(map(len, completion_ids), default=0)
    if len(recorders) != 1 or not width:
        return None
    padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in completion_ids])
    logprobs = recorders[0].logprobs(padded)
    if logprobs.shape != padded.shape:
        return None
    return [row[: len(ids)] for row, ids in zip(logprobs.tolist(), completion_ids, strict=True)]


@contextmanager
def _restored(trainer: Any, seed: int, completions_per_prompt: int) -> Iterator[None]:
    """Put the trainer in eval mode on a separate random state, generating for this process only; then restore it."""
    metrics = {mode: {name: list(x) for name, x in values.items()} for mode, values in trainer._metrics.items()}
    num_generations, model, accelerator = trainer.num_generations_eval, generating_model(trainer), trainer.accelerator
    checkpointing = {module: x for module in model.modules() if (x := vars(module).get("gradient_checkpointing"))}
    trainer.num_generations_eval = completions_per_prompt
    # The trainer gathers lengths for its metrics, where a process would wait for one whose generation failed.
    gather = vars(accelerator).get("gather")
    accelerator.gather = lambda tensor: tensor
    try:
        with preserve_random_state(accelerator.device), eval_mode(trainer.model), seeded_rng(seed, accelerator.device):
            yield
    finally:
        del accelerator.gather
        if gather is not None:
            accelerator.gather = gather
        trainer.num_generations_eval = num_generations
        # The trainer turns checkpointing off to generate, and on again unless generation fails.
        for module, value in checkpointing.items():
            vars(module)["gradient_checkpointing"] = value
        for mode, values in metrics.items():
            trainer._metrics[mode].clear()
            trainer._metrics[mode].update(values)
