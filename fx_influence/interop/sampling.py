"""On-policy rollouts from a Hugging Face model: full-softmax samples, the log-probs of the draws, rewards.

Estimates over rollouts assume that they were sampled from pi, so ``on_policy.check_on_policy`` compares the log-probs
recorded while sampling with scored ones before anything is computed from the rollouts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fx_influence.interop.generation import eos_token_ids, full_softmax_config, generate_tokens, sampling_mode
from fx_influence.interop.prompts import Prompt, text_for
from fx_influence.interop.rewards import Reward, TextOrMessages
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.scoring import score
from fx_influence.losses import group_advantages

Progress = Callable[[int, int], None]
"""Called with (number of rollouts done, number of all rollouts) after each sampled chunk."""


def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    completions_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[Rollout]:
    """Sample ``completions_per_prompt`` completions of each prompt from the policy's full softmax at ``temperature``.

    The model's generation config decides the end-of-sequence ids and nothing else; that config, the training mode of
    every module and the global random state are restored afterwards. The same seed and ``batch_size`` give the same
    rollouts bit for bit on one machine.

    Args:
        model: a Hugging Face causal LM, or a PEFT model around one; it is in eval mode during the call.
        tokenizer: the model's tokenizer.
        prompts: texts or conversations, with unique ids.
        completions_per_prompt: number of rollouts per prompt.
        max_new_tokens: largest number of tokens per completion.
        temperature: divides the logits.
        seed: of the random state.
        batch_size: number of completions sampled at a time.
        progress: called after each chunk of ``batch_size`` rollouts.

    Returns:
        len(prompts) * completions_per_prompt rollouts without rewards, prompt by prompt. Rollout k of a prompt is named
        ``"{prompt_id}/{k}"``; its group is the prompt's index. Its prompt is what the policy saw: for a conversation,
        the text that the tokenizer's chat template makes of it.

    Raises:
        ValueError: before anything is sampled, for a prompt without tokens or too long for the model, a conversation
            without a chat template, a tokenizer that does not fit the model, no end-of-sequence id, or arguments out of
            range.
    """
    _check_counts(prompts, completions_per_prompt, max_new_tokens, temperature, batch_size)
    prompt_ids = tokenize_prompts(model, tokenizer, prompts, max_new_tokens)
    ends = eos_token_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    texts = [text_for(tokenizer, prompt) for prompt in prompts]
    config = full_softmax_config(ends, pad_id, max_new_tokens)
    rows = [(g, k) for g in range(len(prompts)) for k in range(completions_per_prompt)]
    rollouts: list[Rollout] = []
    with sampling_mode(model, config, seed):
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            samples = generate_tokens(model, [prompt_ids[g] for g, _ in chunk], config, temperature)
            for (g, k), (tokens, logprobs) in zip(chunk, samples, strict=True):
                end = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
                args = (texts[g], prompt_ids[g], tokens[:end], logprobs[:end], end is not None)
                rollouts.append(_rollout(tokenizer, prompts[g], g, k, *args))
            if progress is not None:
                progress(len(rollouts), len(rows))
    return rollouts


def tokenize_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[tuple[int, ...]]:
    """Tokenize prompts as the policy sees them.

    Args:
        model: the causal LM.
        tokenizer: its tokenizer.
        prompts: n texts or conversations.
        max_new_tokens: number of tokens that have to fit after each prompt.

    Returns:
        n tuples of token ids.

    Raises:
        ValueError: for a prompt without tokens or too long for the model, or a tokenizer that does not fit the model.
    """
    texts = [text_for(tokenizer, prompt) for prompt in prompts]
    # A chat template writes its own special tokens: a tokenizer that adds a bos would put a second one before them.
    prompt_ids = [
        tuple(tokenizer(text, add_special_tokens=prompt.messages is None)["input_ids"])
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} tokens; expected at most {rows}, the rows of the model's embedding. "
            "Use the tokenizer of this checkpoint, or resize_token_embeddings"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for prompt, text, ids in zip(prompts, texts, prompt_ids, strict=True):
        if not ids:
            raise ValueError(f"prompt {prompt.id!r} ({text[:80]!r}) has no tokens; expected at least one")
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {prompt.id!r} has {len(ids)} tokens; expected at most {limit - max_new_tokens}, since the "
                f"model has {limit} positions and max_new_tokens is {max_new_tokens}. Shorten the prompt or lower "
                "max_new_tokens"
            )
    return prompt_ids


def with_rewards(
    rollouts: Sequence[Rollout], prompts: Sequence[Prompt], reward: Reward, *, scale_advantages: bool = True
) -> list[Rollout]:
    """Return the rollouts with rewards and group-relative advantages, from one call of ``reward`` on all of them.

    The prompts' columns go to ``reward``, one value per rollout, None if a prompt lacks a column; for a conversation
    its messages do, and the completion as one more message. A group whose rewards are all equal has advantage exactly
    0. As in TRL, a rollout whose reward is None has advantage 0 and does not count in its group's mean.

    Args:
        rollouts: n rollouts of these prompts.
        prompts: the prompts, found by ``prompt_id``.
        reward: a function with TRL's signature.
        scale_advantages: whether advantages are divided by the group's standard deviation.

    Returns:
        n rollouts in the same order.

    Raises:
        ValueError: for a rollout of an unknown prompt, and as ``scoring.score`` does.
        RewardError: if the function itself raises.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    for rollout in rollouts:
        if rollout.prompt_id not in by_id:
            raise ValueError(
                f"prompt_id of rollout {rollout.id!r} is {rollout.prompt_id!r}; expected the id of a prompt. Pass "
                "the prompts that it was sampled from"
            )
    prompt_of_rollout = [by_id[r.prompt_id] for r in rollouts]
    names = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
    columns = {name: [prompt.columns.get(name) for prompt in prompt_of_rollout] for name in names}
    exchanges = [_exchange(prompt, r) for prompt, r in zip(prompt_of_rollout, rollouts, strict=True)]
    ids = [list(r.completion_ids) for r in rollouts]
    rewards = score(reward, [prompt for prompt, _ in exchanges], [answer for _, answer in exchanges], columns, ids)
    advantages = _advantages(rewards, [r.group for r in rollouts], scale_advantages)
    return [
        dataclasses.replace(r, reward=x, advantage=a) for r, x, a in zip(rollouts, rewards, advantages, strict=True)
    ]


def sample_rewarded(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    *,
    completions_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 64,
    resample_zero_advantage: int = 0,
    scale_advantages: bool = True,
    progress: Progress | None = None,
) -> list[Rollout]:
    """Sample rollouts with rewards; groups whose advantages are all zero are sampled again, a bounded number of times.

    A group without advantages moves the policy nowhere. Each of up to ``resample_zero_advantage`` rounds samples the
    remaining ones again, with a seed derived from ``seed`` and the round; the last sample is used whatever it is. The
    choice depends on the rewards, so use it for update batches, never for an evaluation batch.

    Args:
        model: a Hugging Face causal LM, or a PEFT model around one.
        tokenizer: the model's tokenizer.
        prompts: texts or conversations, with unique ids.
        reward: a function with TRL's signature, see ``with_rewards``.
        completions_per_prompt: number of rollouts per prompt.
        max_new_tokens: largest number of tokens per completion.
        temperature: divides the logits.
        seed: of the random state.
        batch_size: number of completions sampled at a time.
        resample_zero_advantage: number of further rounds, 0 or more.
        scale_advantages: whether advantages are divided by the group's standard deviation.
        progress: called after each chunk of ``batch_size`` rollouts of the first round.

    Returns:
        len(prompts) * completions_per_prompt rollouts, prompt by prompt.

    Raises:
        ValueError: as ``sample`` and ``with_rewards`` do, and for a negative number of rounds.
        RewardError: if the reward function raises.
    """
    if resample_zero_advantage < 0:
        raise ValueError(
            f"resample_zero_advantage is {resample_zero_advantage}; expected a number of rounds, 0 or more"
        )
    draw = partial(
        sample,
        model,
        tokenizer,
        completions_per_prompt=completions_per_prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
    )
    add_rewards = partial(with_rewards, prompts=prompts, reward=reward, scale_advantages=scale_advantages)
    rollouts = add_rewards(draw(prompts, seed=seed, progress=progress))
    for attempt in range(1, resample_zero_advantage + 1):
        flat = sorted(_groups_without_advantage(rollouts))
        if not flat:
            break
        redrawn = draw([prompts[g] for g in flat], seed=_derived_seed(seed, attempt))
        fresh = {r.id: r for r in add_rewards([dataclasses.replace(r, group=flat[r.group]) for r in redrawn])}
        rollouts = [fresh.get(r.id, r) for r in rollouts]
    return rollouts


def _exchange(prompt: Prompt, rollout: Rollout) -> tuple[TextOrMessages, TextOrMessages]:
    """Return the prompt and the completion as TRL passes them to a reward function."""
    if prompt.messages is None:
        return rollout.prompt, rollout.completion
    return [dict(message) for message in prompt.messages], [{"role": "assistant", "content": rollout.completion}]


def _advantages(rewards: Sequence[float | None], groups: Sequence[int], scale: bool) -> list[float]:
    """Return group-relative advantages, 0 where the reward is None."""
    scored = [i for i, reward in enumerate(rewards) if reward is not None]
    group = torch.tensor([groups[i] for i in scored])
    relative = group_advantages(torch.tensor([rewards[i] for i in scored], dtype=torch.float64), group, scale=scale)
    advantages = dict(zip(scored, relative.tolist(), strict=True))
    return [advantages.get(i, 0.0) for i in range(len(rewards))]


def _rollout(
    tokenizer: Any,
    prompt: Prompt,
    group: int,
    k: int,
    text: str,
    prompt_ids: tuple[int, ...],
    tokens: list[int],
    logprobs: list[float],
    finished: bool,
) -> Rollout:
    """Make the record of one sampled completion."""
    return Rollout(
        id=f"{prompt.id}/{k}",
        prompt_id=prompt.id,
        group=group,
        prompt=text,
        completion=tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        prompt_ids=prompt_ids,
        completion_ids=tuple(tokens),
        finished=finished,
        behaviour_logprobs=tuple(logprobs),
        question=prompt.question,
        source=prompt.source,
    )


def _groups_without_advantage(rollouts: Sequence[Rollout]) -> set[int]:
    """Return the groups all of whose rollouts have advantage zero or None."""
    return {r.group for r in rollouts} - {r.group for r in rollouts if r.advantage}


def _derived_seed(seed: int, attempt: int) -> int:
    # A large multiplier, so that the rounds of seed 0 are not the first draws of seeds 1, 2, ...
    return (seed + attempt * 0x9E3779B97F4A7C15) % 2**63


def _check_counts(
    prompts: Sequence[Prompt], completions_per_prompt: int, max_new_tokens: int, temperature: float, batch_size: int
) -> None:
    if not prompts:
        raise ValueError("prompts is empty; expected at least one prompt")
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(
            f"prompts hold id {twice!r} more than once; expected unique ids, since rollouts are named by them"
        )
    counts = {
        "completions_per_prompt": completions_per_prompt,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
    }
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a positive number (1.0 samples the policy as it is)")
