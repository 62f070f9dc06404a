"""A pretrained chat model as a policy of the evidence's training runs, after supervised steps on answers.

Untrained, the model writes sentences around an answer, and its verifiers give next to nothing: what GRPO then learns
first is to leave them out, which costs most of the entropy. Some supervised steps on answers alone come before, as they
do for the small policies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.evidence.arithmetic import Task
from benchmarks.evidence.bench_counterfactual import MAX_NORM
from benchmarks.evidence.training_runs import Policy
from benchmarks.real import predicted_run
from benchmarks.real.predicted_run import Settings, initial_policy
from fx_influence.interop.prompts import Prompt, text_for
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.sampling import sample_rewarded
from fx_influence.types import Batch

ROWS = 16
"""Answers of a supervised step."""


def chat_policy(settings: Settings, answered: Sequence[Prompt], weights: Path | None) -> Policy:
    """Return the policy after one supervised step on every ``ROWS`` of the answered prompts, at the settings' lr.

    Args:
        settings: model, layers with adapters, reward, prompts, and length of the longest completion.
        answered: prompts with the column ``answer``.
        weights: file of the adapters after these steps, written at the first call; None stores nothing.
    """
    chat = initial_policy(settings)
    if weights is not None and weights.exists():
        with torch.no_grad():
            for name, adapter in load_file(weights).items():
                chat.parameters()[name].copy_(adapter)
    else:
        for start in range(0, len(answered), ROWS):
            supervised_step(chat, answers(chat.tokenizer, answered[start : start + ROWS]))
        if weights is not None:
            weights.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: p.detach().contiguous() for name, p in chat.parameters().items()}, weights)
    return Policy(
        chat.end,
        chat.tokenizer,
        Task(max_new_tokens=settings.tokens),
        list(settings.train),
        list(settings.held_out),
        partial(draw_completions, chat.model, settings.reward),
        score_completions,
    )


def answers(tokenizer: Any, prompts: Sequence[Prompt]) -> list[Rollout]:
    """Return the prompts with their answers as completions."""
    rollouts = []
    for prompt in prompts:
        text, answer = text_for(tokenizer, prompt), prompt.columns["answer"]
        ids, completion = (tuple(tokenizer(x, add_special_tokens=False)["input_ids"]) for x in (text, answer))
        completion = (*completion, tokenizer.eos_token_id)
        rollouts.append(Rollout(prompt.id, prompt.id, 0, text, answer, ids, completion, True, (0.0,) * len(completion)))
    return rollouts


def supervised_step(chat: predicted_run.Policy, rollouts: Sequence[Rollout]) -> None:
    """Make one step of the optimizer on the mean log-probability of the completions' tokens."""
    batch = chat.collate(rollouts)
    logprobs, _ = score_completions(chat.end, batch)
    chat.optimizer.zero_grad()
    (-logprobs[batch.completion_mask].mean()).backward()
    nn.utils.clip_grad_norm_(chat.end.parameters(), MAX_NORM)
    chat.optimizer.step()
    chat.end.get_input_embeddings().forget()


def draw_completions(
    model: nn.Module,
    reward: Callable[..., list[float]],
    end: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    each: int,
    seed: int,
    max_new_tokens: int,
) -> list[Rollout]:
    """Sample rollouts with rewards and group advantages from the complete model; the ``end`` forgets earlier rows.

    Args:
        model: the model that samples.
        reward: a reward function.
        end: its trainable layers, on top of ``FrozenLayers``.
        tokenizer: its tokenizer.
        prompts: prompts with the columns that the reward reads.
        each: completions of each prompt.
        seed: of the sampling.
        max_new_tokens: length at which a completion is cut off.
    """
    end.get_input_embeddings().forget()
    return sample_rewarded(
        model,
        tokenizer,
        prompts,
        reward,
        completions_per_prompt=each,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        seed=seed,
    )


def score_completions(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies (n, T) as ``score_tokens`` does, with the columns of prompts 0.

    No logits are made before the first completion: most tokens are prompts, and the vocabulary is large.
    """
    length = batch.input_ids.shape[1]
    first = int(batch.completion_mask.any(0).int().argmax())
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        logits_to_keep=length - first + 1,
    ).logits[:, :-1]
    logp = logits.log_softmax(-1)
    logprobs = logp.gather(-1, batch.input_ids[:, first:, None]).squeeze(-1)
    entropies = -(logp.exp() * logp).sum(-1)
    logprobs, entropies = (nn.functional.pad(x, (first, 0)) for x in (logprobs, entropies))
    return logprobs, entropies
