"""Models with training states, and batches, of the GPU benchmark."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

import fx_influence as fx
from benchmarks.gpu.cases import RANK, SHAPES, TOKENS_AT_ONCE, Case, Setting
from fx_influence.batching.rows import select_rows
from fx_influence.types import AdamWHyper, Batch, Params


class Problem(NamedTuple):
    """A model as the library takes it, with a training state."""

    setting: Setting
    apply: fx.Policy
    params: Params
    state: fx.AdamWState


class Task(NamedTuple):
    """A problem with its two batches, of which ``rows_at_once`` rows form a micro-batch."""

    problem: Problem
    u: Batch
    e: Batch

    def rows_at_once(self, dtype: str) -> int:
        return max(1, TOKENS_AT_ONCE[dtype] // self.u.input_ids.shape[1])


def model(setting: Setting, device: str) -> nn.Module:
    """Return a model created on the device in its dtype, because a CPU would take a minute to draw the weights."""
    shape = SHAPES[setting.model]
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    # By default LoRA's second factor is 0, and with it every gradient of the first, so the weights are drawn.
    lora = LoraConfig(r=RANK, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    with torch.device(device):
        base: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, setting.dtype))
        return get_peft_model(base, lora, autocast_adapter_dtype=False) if setting.lora else base


def problem(setting: Setting, device: str) -> Problem:
    """Return a model with a training state on the device."""
    torch.manual_seed(0)
    apply, params = fx.make_functional(model(setting, device), compiled=setting.compiled)
    moments = {name: torch.randn_like(p, dtype=torch.float32).mul_(1e-4) for name, p in params.items()}
    # Moments of many steps: with denominators due to this gradient alone, the conditioning would cost one more product.
    squares = {name: torch.rand_like(p, dtype=torch.float32).add_(0.5).mul_(1e-4) for name, p in params.items()}
    steps = dict.fromkeys(params, 100)
    hyper = dict.fromkeys(params, AdamWHyper(weight_decay=0.01))
    return Problem(setting, apply, params, fx.AdamWState(moments, squares, {}, steps, hyper, lr=1e-6))


def task(case: Case, prepared: Problem, device: str) -> Task:
    """Return batches with rows of full width, two per prompt, whose first third is the prompt."""
    torch.manual_seed(1)
    with torch.device(device):
        return Task(prepared, *(_batch(SHAPES[case.setting.model].vocab, n, case.width) for n in (case.n_u, case.n_e)))


def _batch(vocab: int, count: int, width: int) -> Batch:
    ids, group = torch.randint(0, vocab, (count, width)), torch.arange(count) // 2
    completion = (torch.arange(width) >= width // 3).expand(count, width)
    c = fx.coefficients("grpo", torch.randn(count), completion)
    return Batch(ids, torch.ones_like(completion), completion, c, group=group)


def first_rows(full: Task, count: int) -> Task:
    """Return the task with the first ``count`` rows of each batch."""
    return full._replace(u=select_rows(full.u, slice(count)), e=select_rows(full.e, slice(count)))


def in_float32(half: Problem) -> Problem:
    """Return the problem with the same weights in float32."""
    params = {name: p.float() for name, p in half.params.items()}
    return half._replace(
        setting=half.setting._replace(dtype="float32"), apply=half.apply.with_min_precision(), params=params
    )
