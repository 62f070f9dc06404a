"""Small models that a Trainer trains and saves, for tests that read the checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)

from fx_influence.types import AdamWState

SMALL: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False, attention_bias=True),
    "gpt2": lambda: GPT2Config(vocab_size=12, n_positions=32, n_embd=8, n_layer=2, n_head=2, eos_token_id=1),
}

# peft before 0.21 does not save these biases.
BIAS = {"bias": "lora_only"} if Version(peft.__version__) >= Version("0.21") else {}

LORA: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "dora": {"target_modules": ["q_proj", "o_proj"], "use_dora": True, **BIAS},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}


def make_tokenizer(size: int = 12) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the first ``size`` tokens: three special ones, digits and signs."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789+="][:size])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token="<pad>"
    )


def train(model: Any, path: Path, schedule: str = "constant") -> Trainer:
    """Train two steps by transformers' Trainer, which saves ``path/checkpoint-2``."""
    rows = torch.randint(3, 12, (4, 6), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        output_dir=str(path),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type=schedule,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, processing_class=make_tokenizer())
    trainer.train()
    return trainer


def assert_same_weights(loaded: nn.Module, live: nn.Module) -> None:
    """Assert equal parameters in the same order, bit for bit."""
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in live.named_parameters()]
    assert all(torch.equal(loaded.get_parameter(name), parameter) for name, parameter in live.named_parameters())


def assert_same_state(loaded: AdamWState, live: AdamWState) -> None:
    """Assert that two optimizer states are equal to the bit, with names in the same order."""
    assert list(loaded.step) == list(live.step)
    assert (loaded.step, loaded.hyper, loaded.lr) == (live.step, live.hyper, live.lr)
    for actual, expected in zip(loaded[:3], live[:3], strict=True):
        assert list(expected) == list(actual)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
