"""Held-out rollouts from a TRL trainer's own generation, which leave no trace in the training."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from fx_influence.interop.generation import LogprobRecorder, eval_mode, seeded_rng
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.trl.generation import generating_model
from fx_influence.interop.trl.ranks import of_all, place, share

FAR = 0x9E3779B97F4A7C15
"""Between the seeds of two processes, so that no process draws what another does at a later step."""


def held_out_rollouts(
    trainer: Any, prompts: Sequence[Any], completions_per_prompt: int, seed: int, mesh: DeviceMesh | None = None
) -> list[Rollout]:
    """``completions_per_prompt`` completions of each prompt, by the trainer's own generation in eval mode.

    ``prompts``: texts, or conversations as lists of messages. ``mesh``: of the trainer's processes, all of which make
    this call; each draws its share of the prompts, and gets the rollouts of all. The trainer's random state, training
    mode and metrics are as before afterwards. Returns the rollouts prompt by prompt, ``group`` numbering the prompts,
    ``behaviour_logprobs`` what their tokens were drawn with, NaN or None where nobody can tell.
    """
    own = prompts[share(len(prompts), mesh)]
    ranks, rank = place(mesh)
    # A generation by a server must be as large on each process; what is too many is dropped.
    asked = [*own, *[prompts[-1]] * (-(-len(prompts) // ranks) - len(own))]
    with _untouched(trainer, (seed + rank * FAR) % 2**63, completions_per_prompt):
        drawn = _drawn(trainer, [prompt for prompt in asked for _ in range(completions_per_prompt)])
    everyone = [row for some in of_all(mesh, drawn[: len(own) * completions_per_prompt]) for row in some]
    return [
        rollout_of(trainer, *divmod(i, completions_per_prompt), *ids, behaviour_logprobs=logprobs)
        for i, (*ids, logprobs) in enumerate(everyone)
    ]


def rollout_of(
    trainer: Any, group: int, k: int, prompt_ids: Sequence[int], completion_ids: Sequence[int], **judged: Any
) -> Rollout:
    """Completion number ``k`` of prompt number ``group`` as a record; ``judged``: further fields of it."""
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
        **judged,
    )


_Drawn = tuple[list[int], list[int], tuple[float, ...] | None]
"""Token ids of a prompt and its completion, and the log-probs that the latter was drawn with, where they are known."""


def _drawn(trainer: Any, prompts: list[Any]) -> list[_Drawn]:
    """Completions of prompts, as many at a time as the trainer generates of its own."""
    each = trainer.num_generations_eval
    size = max(1, trainer.args.generation_batch_size // trainer.accelerator.num_processes // each) * each
    found: list[_Drawn] = []
    for start in range(0, len(prompts), size):
        with _recorded(generating_model(trainer)) as recorders:
            prompt_ids, completion_ids, *further = trainer._generate(prompts[start : start + size])
        # A server tells them, with None for a token that it could not score; RLOOTrainer hands none on.
        told = further[2] if len(further) > 2 else None
        logprobs = _logprobs(recorders, completion_ids) if told is None else told
        for ids, completion, values in zip(prompt_ids, completion_ids, logprobs or repeat(None), strict=False):
            known = None if values is None else tuple(math.nan if x is None else float(x) for x in values)
            found.append((ids, completion, known))
    return found


@contextmanager
def _recorded(model: Any) -> Iterator[list[LogprobRecorder]]:
    """Every call of ``generate`` inside with a recorder behind all that it does to logits."""
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

    before = vars(model).get("_get_logits_processor")
    vars(model)["_get_logits_processor"] = with_recorder
    try:
        yield recorders
    finally:
        del vars(model)["_get_logits_processor"]
        if before is not None:
            vars(model)["_get_logits_processor"] = before


def _logprobs(recorders: list[LogprobRecorder], completion_ids: list[list[int]]) -> list[list[float]] | None:
    """What the one recorder kept of these completions; None where it is not of them."""
    width = max(map(len, completion_ids), default=0)
    if len(recorders) != 1 or not width:
        return None
    padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in completion_ids])
    found = recorders[0].logprobs(padded)
    if found.shape != padded.shape:
        return None
    return [row[: len(ids)] for row, ids in zip(found.tolist(), completion_ids, strict=True)]


@contextmanager
def _untouched(trainer: Any, seed: int, completions_per_prompt: int) -> Iterator[None]:
    """The trainer in eval mode on a random state of its own, generating for this process alone; all put back."""
    metrics = {mode: {name: list(values) for name, values in found.items()} for mode, found in trainer._metrics.items()}
    each, model, accelerator = trainer.num_generations_eval, generating_model(trainer), trainer.accelerator
    checkpoints = {module: x for module in model.modules() if (x := vars(module).get("gradient_checkpointing"))}
    trainer.num_generations_eval = completions_per_prompt
    # It gathers lengths for its metrics, where a process would wait for one whose generation failed.
    gather = vars(accelerator).get("gather")
    accelerator.gather = lambda tensor: tensor
    try:
        with random_state(trainer), eval_mode(trainer.model), seeded_rng(seed, accelerator.device):
            yield
    finally:
        del accelerator.gather
        if gather is not None:
            accelerator.gather = gather
        trainer.num_generations_eval = each
        # The trainer turns it off to generate, and on again unless that fails.
        for module, checkpointing in checkpoints.items():
            vars(module)["gradient_checkpointing"] = checkpointing
        for mode, found in metrics.items():
            trainer._metrics[mode].clear()
            trainer._metrics[mode].update(found)


@contextmanager
def random_state(trainer: Any) -> Iterator[None]:
    """Every random state that a training draws from, put back afterwards."""
    states = random.getstate(), np.random.get_state()
    device = trainer.accelerator.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
