"""Problems that the benchmarks measure: random models with a training state, and two batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import fx_influence as fx
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.types import Batch, Params

SIZES = {
    "tiny": (32, 64, 2, 64),
    "3M": (256, 576, 4, 1024),
    "4M": (256, 704, 5, 1024),
    "9M": (320, 1024, 6, 4096),
    "24M": (512, 1408, 8, 1024),
    "wide": (64, 128, 2, 151_936),
}
"""Hidden size, intermediate size, layers, vocabulary."""


class Setting(NamedTuple):
    """Size of a problem.

    ``size``: see ``SIZES``. ``rows``: of U and of E, with ``width`` tokens each, a third of them prompt. ``group``:
    number of rows with the same prompt, as GRPO samples them.
    """

    size: str
    lora: bool = False
    rows: int = 16
    width: int = 128
    group: int = 1

    @property
    def title(self) -> str:
        per_prompt = f", {self.group} to a prompt" if self.group > 1 else ""
        return f"{self.size} {'LoRA' if self.lora else 'full'}, {self.rows} x {self.width}{per_prompt}"


class Problem(NamedTuple):
    """A random model with a training state, and two batches."""

    model: nn.Module
    apply: fx.Policy
    params: Params
    state: fx.AdamWState
    u: Batch
    e: Batch
    gradient: Params
    gain: Params


def problem(setting: Setting, compiled: bool = False, varied: bool = False, e_rows: int | None = None) -> Problem:
    """Return a problem with random weights and rollouts, the same for the same arguments.

    Args:
        setting: its size.
        compiled: see ``make_functional``.
        varied: whether prompts and completions have many lengths, padded on both sides.
        e_rows: number of rows of E, if it differs from U's.
    """
    torch.manual_seed(0)
    hidden, intermediate, layers, vocab = SIZES[setting.size]
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model: Any = Qwen2ForCausalLM(config)
    if setting.lora:
        model = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM", target_modules="all-linear"))
    apply, params = fx.make_functional(model.eval(), compiled=compiled)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p) if p.requires_grad else None
    optimizer.step()
    model.zero_grad()
    state = fx.adamw_state(optimizer, model)
    u, e = (_batch(vocab, rows, setting, varied) for rows in (setting.rows, e_rows or setting.rows))
    gradient = {n: g for n, g in batch_gradient(params, u, apply).items() if g is not None}
    gain = fx.adamw_decompose(gradient, state, params).gain
    return Problem(model, apply, params, state, u, e, gradient, gain)


def _batch(vocab: int, rows: int, setting: Setting, varied: bool) -> Batch:
    width = setting.width
    ids = torch.randint(0, vocab, (rows, width))
    position, prompt = torch.arange(width).expand(rows, width), width // 3
    begin, end = torch.zeros(rows, 1, dtype=torch.long), torch.full((rows, 1), width)
    if varied:
        begin, end = torch.randint(0, prompt - 1, (rows, 1)), torch.randint(prompt + 1, width + 1, (rows, 1))
    if setting.group > 1:
        first = torch.arange(rows) // setting.group * setting.group
        ids, begin = torch.where(position < prompt, ids[first], ids), begin[first]
    attended: Tensor = (position >= begin) & (position < end)
    completion = attended & (position >= prompt)
    c = fx.coefficients("grpo", torch.randn(rows), completion)
    return Batch(ids, attended, completion, c, group=torch.arange(rows) // max(2, setting.group))
