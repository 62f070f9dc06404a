"""A small policy that learns sums: its task, tokenizer, model, supervised warm-up and GRPO step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.trainer_pt_utils import get_parameter_names

from fx_influence.autodiff.token_values import surrogate
from fx_influence.interop.checkpoints.optimizer_state import NO_DECAY_PATTERNS
from fx_influence.interop.prompts import Prompt
from fx_influence.interop.rewards import exact_match
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.sampling import sample_rewarded
from fx_influence.losses import coefficients
from fx_influence.types import Batch, TokenValues

CHAIN_SHARE = 0.8
"""Share of supervised completions that are written out, and not the answer only."""


class Task(NamedTuple):
    """Sums of as many numbers as in ``operands``, each at most ``largest``, with partial results in 0 to ``within``."""

    largest: int = 19
    operands: tuple[int, ...] = (3, 4)
    within: int = 99
    max_new_tokens: int = 20


SHIPPED, HARDER = Task(), Task(largest=99, operands=(4, 5), within=299, max_new_tokens=40)
"""The demo policy's task, and one of longer chains of larger numbers, where exploring pays."""

SIZES = {"toy": (32, 64, 2), "demo": (64, 160, 4), "large": (128, 320, 6), "largest": (320, 960, 8)}
"""Hidden size, intermediate size, layers."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character and distinct padding and end-of-sequence tokens."""
    # Qwen2's tokenizer class, with which a Qwen2 checkpoint is loaded, adds this token if it is missing.
    eos = "<|endoftext|>"
    vocabulary = {token: i for i, token in enumerate(["<pad>", eos, *"0123456789+-="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos)


def build_model(tokenizer: PreTrainedTokenizerFast, size: str = "demo") -> Qwen2ForCausalLM:
    """Return a random Qwen2 with tied embeddings, of 20 thousand, 174 thousand, one or ten million parameters."""
    hidden, intermediate, layers = SIZES[size]
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def draw_chain(rng: random.Random, task: Task = SHIPPED) -> tuple[str, str, str]:
    """Return a random prompt, the chain that reduces it one operation at a time, and its answer."""
    while True:
        numbers = [rng.randint(1, task.largest) for _ in range(rng.choice(task.operands))]
        signs = [rng.choice("+-") for _ in numbers[1:]]
        total, states = numbers[0], []
        for k, (sign, number) in enumerate(zip(signs, numbers[1:], strict=True), 1):
            total += number if sign == "+" else -number
            rest = "".join(s + str(n) for s, n in zip(signs[k:], numbers[k + 1 :], strict=True))
            states.append((total, f"{total}{rest}"))
        if all(0 <= value <= task.within for value, _ in states):
            prompt = str(numbers[0]) + "".join(s + str(n) for s, n in zip(signs, numbers[1:], strict=True)) + "="
            return prompt, "=".join(text for _, text in states), str(total)


def draw_prompts(rng: random.Random, count: int, taken: set[str], prefix: str, task: Task = SHIPPED) -> list[Prompt]:
    """Return new random prompts.

    Args:
        rng: source of the draws.
        count: number of prompts.
        taken: texts that are not drawn again; the new ones are added to it.
        prefix: beginning of the prompts' ids.
        task: kind of sums.
    """
    prompts: list[Prompt] = []
    while len(prompts) < count:
        text, _, answer = draw_chain(rng, task)
        if text not in taken:
            taken.add(text)
            prompts.append(Prompt(f"{prefix}{len(prompts):03d}", text, {"answer": answer}))
    return prompts


def supervised_batch(rng: random.Random, tokenizer: Any, size: int, held_out: set[str], task: Task = SHIPPED) -> Batch:
    """Return correct completions of fresh prompts, ``CHAIN_SHARE`` of them written out and the others the answer only.

    Args:
        rng: source of the draws.
        tokenizer: one token per character.
        size: number of rows.
        held_out: texts of prompts that do not occur.
        task: kind of sums.
    """
    rows: list[Rollout] = []
    while len(rows) < size:
        text, chain, answer = draw_chain(rng, task)
        if text in held_out:
            continue
        target = chain if rng.random() < CHAIN_SHARE else answer
        ids = (*tokenizer(target)["input_ids"], tokenizer.eos_token_id)
        rows.append(Rollout("", "", 0, text, target, tuple(tokenizer(text)["input_ids"]), ids, True, (0.0,) * len(ids)))
    return collate(rows, tokenizer.pad_token_id)


def score_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies (B, T) of the tokens, with column 0 zero."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits[:, :-1]
    logp = logits.log_softmax(-1)
    logprobs = logp.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return nn.functional.pad(logprobs, (1, 0)), nn.functional.pad(entropy, (1, 0))


def draw(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    completions: int,
    seed: int,
    max_new_tokens: int = SHIPPED.max_new_tokens,
) -> list[Rollout]:
    """Sample on-policy rollouts with exact-match rewards and group advantages.

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        prompts: prompts with answers.
        completions: completions of each prompt.
        seed: of the sampling.
        max_new_tokens: length at which a completion is cut off.
    """
    return sample_rewarded(
        model,
        tokenizer,
        prompts,
        exact_match,
        completions_per_prompt=completions,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        seed=seed,
        batch_size=256,
    )


def measure(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    completions: int,
    seed: int,
    max_new_tokens: int = SHIPPED.max_new_tokens,
) -> dict[str, float]:
    """Return accuracy, entropy per token, completion length and the share of prompts with a nonzero advantage.

    The arguments are those of ``draw``.
    """
    rollouts = draw(model, tokenizer, prompts, completions, seed, max_new_tokens)
    batch = collate(rollouts, tokenizer.pad_token_id)
    with torch.no_grad():
        _, entropy = score_tokens(model, batch)
    return {**rollout_means(rollouts), "entropy": entropy[batch.completion_mask].mean().item()}


def rollout_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return means over rollouts that have rewards."""
    groups = {r.group for r in rollouts}
    return {
        "accuracy": sum(r.reward or 0.0 for r in rollouts) / len(rollouts),
        "mean_length": sum(len(r.completion_ids) for r in rollouts) / len(rollouts),
        "finished": sum(r.finished for r in rollouts) / len(rollouts),
        "groups_with_advantage": len({r.group for r in rollouts if r.advantage}) / len(groups),
    }


def warm_up(
    model: nn.Module,
    tokenizer: Any,
    held_out: set[str],
    *,
    steps: int = 2400,
    lr: float = 4e-3,
    stop_at: float = 0.4,
    seed: int = 0,
    task: Task = SHIPPED,
    probes: int = 128,
) -> None:
    """Train the model by supervised steps until its accuracy on fresh prompts suffices.

    Args:
        model: a random model.
        tokenizer: its tokenizer.
        held_out: texts of prompts that are not trained on.
        steps: largest number of steps.
        lr: peak of the learning rate.
        stop_at: accuracy that suffices.
        seed: of the draws.
        task: kind of sums.
        probes: number of fresh prompts.
    """
    rng = random.Random(seed + 1)
    probe = draw_prompts(rng, probes, set(held_out), "probe", task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 100, 1 - step / steps)
        batch = supervised_batch(rng, tokenizer, 128, held_out, task)
        logp, _ = score_tokens(model, batch)
        loss = -logp[batch.completion_mask].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            figures = measure(model, tokenizer, probe, 4, seed, task.max_new_tokens)
            print(f"warm-up {step + 1:5d}  loss {loss.item():.3f}  {line(figures)}", flush=True)
            if figures["accuracy"] >= stop_at:
                return


def fresh_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """Return AdamW with the two parameter groups of the Hugging Face Trainer: norms and biases are not decayed."""
    decay = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY_PATTERNS))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name in decay], "weight_decay": 0.01},
        {"params": [p for name, p in trainable if name not in decay], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))


def update_batch(rollouts: Sequence[Rollout], pad_id: int, max_new_tokens: int = SHIPPED.max_new_tokens) -> Batch:
    """Return U with the coefficients of Dr. GRPO."""
    batch = collate(rollouts, pad_id)
    advantages = torch.tensor([r.advantage or 0.0 for r in rollouts])
    c = coefficients("dr_grpo", advantages, batch.completion_mask, max_completion_length=max_new_tokens)
    return batch._replace(coefficients=c)


def reinforce(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, float]:
    """Make one optimizer step on a batch with coefficients, clipped to norm 1; return entropy and gradient norm."""
    logp, entropy = score_tokens(model, batch)
    optimizer.zero_grad()
    surrogate(TokenValues(logp, entropy), batch).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return {"entropy": entropy[batch.completion_mask].mean().item(), "grad_norm": norm.item()}


def line(figures: dict[str, float]) -> str:
    """Return the figures on one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != "step")
