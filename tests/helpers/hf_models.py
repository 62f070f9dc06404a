"""Small Hugging Face causal LMs with warm AdamW states and batches, for tests of every room."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import fx_influence as fx
from fx_influence.types import AdamWState, Batch, Params
from helpers.cases import random_batch
from helpers.present import present

VOCAB, WIDTH = 19, 12

FAMILIES = ("qwen2", "qwen3", "llama", "gpt2")

SLOW_FAMILIES = ("qwen3", "llama")
"""Families whose layers differ little from those of the others."""

families = pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW_FAMILIES else ()) for name in FAMILIES],
)

adapters = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


def make_config(family: str, tied: bool, dropout: float, layers: int = 2) -> PretrainedConfig:
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "initializer_range": 0.3,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "gpt2":
        drops = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), dropout)
        return GPT2Config(n_positions=2 * WIDTH, n_embd=16, n_layer=layers, n_head=2, **common, **drops)
    kind: Any = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[family]
    return kind(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2 * WIDTH,
        attention_dropout=dropout,
        **({"head_dim": 8} if family == "qwen3" else {}),
        **common,
    )


def make_model(
    family: str,
    *,
    lora: bool = False,
    tied: bool = True,
    dropout: float = 0.0,
    attention: str = "eager",
    layers: int = 2,
) -> Any:
    """Return a small model in float32 and in training mode; two calls give the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(
            make_config(family, tied, dropout, layers), attn_implementation=attention
        )
        with torch.no_grad():
            for p in model.parameters():
                # Norms and biases start at 1 and 0, where an error in them would be invisible.
                p += 0.2 * torch.randn_like(p) if p.ndim == 1 else 0.0
        if lora:
            options = {"target_modules": "all-linear", "init_lora_weights": False, "fan_in_fan_out": family == "gpt2"}
            model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", lora_dropout=dropout, **options))
    return model.train()


def warm_state(model: nn.Module) -> AdamWState:
    """Return the state of an AdamW with two groups after three steps, which change the model."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "lr": 5e-4, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        for p in trained:
            p.grad = 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    optimizer.zero_grad()
    return fx.adamw_state(optimizer, model)


class State(NamedTuple):
    """The positional arguments of ``fx.influence``."""

    params: Params
    batch_u: Batch
    batch_e: Batch
    opt_state: AdamWState


@functools.cache
def make_batches() -> tuple[Batch, Batch]:
    """Return U and E, padded on the right, with completions of 1 to WIDTH - 1 tokens and prompts of unequal count."""
    generator = torch.Generator().manual_seed(5)
    batch_u = random_batch(generator, 6, WIDTH, VOCAB, groups=3, coefficients=False)
    batch_e = random_batch(generator, 8, WIDTH, VOCAB, groups=5, coefficients=False)
    for batch in (batch_u, batch_e):
        lengths, counts = batch.completion_mask.sum(-1), torch.bincount(present(batch.group))
        assert (lengths.min(), lengths.max()) == (1, WIDTH - 1)
        assert counts.min() < counts.max()
    rewards = torch.randn(6, generator=generator)
    c = fx.coefficients("prompt_max", rewards - rewards.mean(), batch_u.completion_mask, group=batch_u.group)
    return batch_u._replace(coefficients=c, entropy_coefficients=0.01 * batch_u.completion_mask), batch_e


def left_padded(batch: Batch) -> Batch:
    """Return the same rows with the padding moved to the left."""
    used = batch.attention_mask.sum(-1, keepdim=True)
    source = (torch.arange(WIDTH) + used) % WIDTH
    fields = [None if x is None else x.gather(1, source) if x.dim() == 2 else x for x in batch]
    return Batch._make(fields)


def right_padded(values: Tensor, batch: Batch) -> Tensor:
    """Return token values of ``left_padded(batch)`` at the columns of ``batch``."""
    return values.gather(1, (torch.arange(WIDTH) - batch.attention_mask.sum(-1, keepdim=True)) % WIDTH)


def setup(model: nn.Module) -> tuple[fx.Policy, State]:
    """Return the policy of a model, and parameters, batches and a warm optimizer state for it."""
    opt_state = warm_state(model)
    apply, params = fx.make_functional(model)
    return apply, State(params, *make_batches(), opt_state)
