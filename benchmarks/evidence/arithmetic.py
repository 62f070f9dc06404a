"""A small policy that learns sums: its task, tokenizer, model, warm-up and GRPO step, for whatever trains one here."""

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

WRITTEN_OUT = 0.8


class Task(NamedTuple):
    """Sums of so many ``operands``, each at most ``largest``, whose partial results stay within 0 and ``within``."""

    largest: int = 19
    operands: tuple[int, ...] = (3, 4)
    within: int = 99
    max_new_tokens: int = 20


SHIPPED, HARDER = Task(), Task(largest=99, operands=(4, 5), within=299, max_new_tokens=40)
"""The demo policy's task, and one of longer chains of larger numbers, where exploring pays."""

SIZES = {"toy": (32, 64, 2), "demo": (64, 160, 4), "large": (128, 320, 6)}
"""Hidden size, intermediate size, layers."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with distinct padding and end-of-sequence tokens."""
    # Qwen2's tokenizer class, which a Qwen2 checkpoint is loaded with, adds this very token where there is none.
    eos = "<|endoftext|>"
    vocabulary = {token: i for i, token in enumerate(["<pad>", eos, *"0123456789+-="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos)


def build_model(tokenizer: PreTrainedTokenizerFast, size: str = "demo") -> Qwen2ForCausalLM:
    """A Qwen2 with tied embeddings, randomly initialised: of 20 thousand parameters, 174 thousand, or a million."""
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
    """(prompt, chain that reduces it one operation at a time, answer)."""
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
    """``count`` new prompts, none of them in ``taken``, to which they are added."""
    prompts: list[Prompt] = []
    while len(prompts) < count:
        text, _, answer = draw_chain(rng, task)
        if text not in taken:
            taken.add(text)
            prompts.append(Prompt(f"{prefix}{len(prompts):03d}", text, {"answer": answer}))
    return prompts


def supervised_batch(rng: random.Random, tokenizer: Any, size: int, held_out: set[str], task: Task = SHIPPED) -> Batch:
    """Correct completions of fresh prompts: mostly written out, else the bare answer."""
    rows: list[Rollout] = []
    while len(rows) < size:
        text, chain, answer = draw_chain(rng, task)
        if text in held_out:
            continue
        target = chain if rng.random() < WRITTEN_OUT else answer
        ids = (*tokenizer(target)["input_ids"], tokenizer.eos_token_id)
        rows.append(Rollout("", "", 0, text, target, tuple(tokenizer(text)["input_ids"]), ids, True, (0.0,) * len(ids)))
    return collate(rows, tokenizer.pad_token_id)


def token_scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (B, T) of the tokens, column 0 zero."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits[:, :-1]
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return nn.functional.pad(chosen, (1, 0)), nn.functional.pad(entropy, (1, 0))


def draw(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    completions: int,
    seed: int,
    max_new_tokens: int = SHIPPED.max_new_tokens,
) -> list[Rollout]:
    """On-policy rollouts with exact-match rewards and group advantages."""
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
    """Accuracy, entropy per token, completion length and the share of prompts with a nonzero advantage."""
    rollouts = draw(model, tokenizer, prompts, completions, seed, max_new_tokens)
    batch = collate(rollouts, tokenizer.pad_token_id)
    with torch.no_grad():
        _, entropy = token_scores(model, batch)
    return {**seen(rollouts), "entropy": entropy[batch.completion_mask].mean().item()}


def seen(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over rollouts that were judged."""
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
    """Supervised steps, at most so many, until the accuracy on ``probes`` fresh prompts reaches ``stop_at``."""
    rng = random.Random(seed + 1)
    probe = draw_prompts(rng, probes, set(held_out), "probe", task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 100, 1 - step / steps)
        batch = supervised_batch(rng, tokenizer, 128, held_out, task)
        logp, _ = token_scores(model, batch)
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
    """AdamW with the two parameter groups of the Hugging Face Trainer: norms and biases are not decayed."""
    decay = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY_PATTERNS))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name in decay], "weight_decay": 0.01},
        {"params": [p for name, p in trainable if name not in decay], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))


def update_batch(rollouts: Sequence[Rollout], pad_id: int, max_new_tokens: int = SHIPPED.max_new_tokens) -> Batch:
    """U with the coefficients of Dr. GRPO."""
    batch = collate(rollouts, pad_id)
    advantages = torch.tensor([r.advantage or 0.0 for r in rollouts])
    c = coefficients("dr_grpo", advantages, batch.completion_mask, max_completion_length=max_new_tokens)
    return batch._replace(coefficients=c)


def reinforce(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, float]:
    """One optimizer step on a batch with coefficients, clipped to norm 1; the entropy and norm before it."""
    logp, entropy = token_scores(model, batch)
    optimizer.zero_grad()
    surrogate(TokenValues(logp, entropy), batch).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return {"entropy": entropy[batch.completion_mask].mean().item(), "grad_norm": norm.item()}


def line(figures: dict[str, float]) -> str:
    """Figures on one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != "step")
