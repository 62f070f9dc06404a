"""Held-out rollouts from a TRL trainer's own generation, which leave no trace in the training."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch.distributed.device_mesh import DeviceMesh

from fx_influence.interop.generation import eval_mode, seeded
from fx_influence.interop.rollouts import Rollout
from fx_influence.interop.trl_ranks import of_all, place, share

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (True,),
    "num_beams": (1,),
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "sequence_bias": ({},),
    "forced_eos_token_id": (),
}
"""Settings of a generation that change what is sampled, with the values that do not; None never does."""

FAR = 0x9E3779B97F4A7C15
"""Between the seeds of two processes, so that no process draws what another does at a later step."""


def check_generation(trainer: Any) -> None:
    """Raise ``ValueError`` for a trainer whose completions are not drawn from the policy itself, naming the setting."""
    for field in ("tools", "environment_factories", "rollout_func"):
        if getattr(trainer, field, None):
            raise ValueError(
                f"trainer.{field} is set: its completions are not sampled from the policy alone, so they estimate no "
                "entropy of it; measure a trainer without it"
            )
    if getattr(trainer, "use_transformers_continuous_batching", False):
        raise ValueError(
            "use_transformers_continuous_batching is True, which casts the weights in place before it generates; "
            "set it to False"
        )
    own = trainer.model.generation_config.to_dict() | {"do_sample": True}
    asked = {name: getattr(trainer, name, None) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
    settings = {**own, **asked, **(trainer.args.generation_kwargs or {})}
    for name, neutral in NEUTRAL.items():
        value = settings.get(name)
        if value is not None and value not in neutral:
            raise ValueError(
                f"{name} is {value!r} in the trainer's generation: its completions are not sampled from the policy's "
                f"full softmax, so they would estimate another entropy; set {name} to "
                f"{neutral[0] if neutral else None!r}"
            )


def held_out_rollouts(
    trainer: Any, prompts: Sequence[Any], completions_per_prompt: int, seed: int, mesh: DeviceMesh | None = None
) -> list[Rollout]:
    """``completions_per_prompt`` completions of each prompt, by the trainer's own generation in eval mode.

    ``prompts``: texts, or conversations as lists of messages. ``mesh``: of the trainer's processes, all of which make
    this call; each draws its share of the prompts, and gets the rollouts of all. The trainer's random state, training
    mode and metrics are as before afterwards. Returns the rollouts prompt by prompt, ``group`` numbering the prompts.
    """
    own = prompts[share(len(prompts), mesh)]
    ranks, rank = place(mesh)
    # A generation gathers lengths from all processes and so must be as large on each; what is too many is dropped.
    asked = [*own, *[prompts[-1]] * (-(-len(prompts) // ranks) - len(own))]
    with _untouched(trainer, (seed + rank * FAR) % 2**63, completions_per_prompt):
        drawn = _drawn(trainer, [prompt for prompt in asked for _ in range(completions_per_prompt)])
    everyone = [ids for some in of_all(mesh, drawn[: len(own) * completions_per_prompt]) for ids in some]
    return [rollout_of(trainer, *divmod(i, completions_per_prompt), *ids) for i, ids in enumerate(everyone)]


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


def _drawn(trainer: Any, prompts: list[Any]) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts and completions, as many at a time as the trainer generates of its own."""
    each = trainer.num_generations_eval
    size = max(1, trainer.args.generation_batch_size // trainer.accelerator.num_processes // each) * each
    found: list[tuple[list[int], list[int]]] = []
    for start in range(0, len(prompts), size):
        prompt_ids, completion_ids = trainer._generate(prompts[start : start + size])[:2]
        found += zip(prompt_ids, completion_ids, strict=True)
    return found


@contextmanager
def _untouched(trainer: Any, seed: int, completions_per_prompt: int) -> Iterator[None]:
    """The trainer in eval mode on a random state of its own; random states, metrics and settings put back."""
    metrics = {mode: {name: list(values) for name, values in found.items()} for mode, found in trainer._metrics.items()}
    states = random.getstate(), np.random.get_state()
    each = trainer.num_generations_eval
    trainer.num_generations_eval = completions_per_prompt
    try:
        with eval_mode(trainer.model), seeded(seed, trainer.accelerator.device):
            yield
    finally:
        trainer.num_generations_eval = each
        random.setstate(states[0])
        np.random.set_state(states[1])
        for mode, found in metrics.items():
            trainer._metrics[mode].clear()
            trainer._metrics[mode].update(found)
