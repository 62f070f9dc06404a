"""Small models and tokenizers to sample from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fx_influence.interop.on_policy import check_on_policy
from fx_influence.interop.prompts import Prompt
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.types import Batch
from helpers.tolerances import TINY_POLICY, rounding_bound

EOS, ANOTHER_EOS, POSITIONS = 1, 5, 26
PROMPTS = [Prompt("a", "1+2="), Prompt("b", "3="), Prompt("c", "11+22+3=")]
OPTIONS: dict[str, Any] = {"completions_per_prompt": 8, "max_new_tokens": 8, "temperature": 1.0, "seed": 3}
# Log-probs of one token at a time, with a cache, round otherwise than those of all tokens at once.
ON_POLICY = rounding_bound(torch.float32, TINY_POLICY, math.log(64))
TALK = (
    {"role": "user", "content": "1+2"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "3+1"},
)


def make_tokenizer(pad: str = "<pad>") -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+-="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token="<eos>")


def make_model(kind: str = "qwen2", **changes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        common = {"vocab_size": 15, "eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None, **changes}
        if kind == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=POSITIONS, initializer_range=0.4, **common)
            )
        config = Qwen2Config(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=POSITIONS,
            initializer_range=0.4,
            tie_word_embeddings=True,
            **common,
        )
        model = Qwen2ForCausalLM(config)
        return add_lora(model) if kind == "lora" else model


def add_lora(model: Any) -> Any:
    with warnings.catch_warnings():
        # PEFT asks transformers for a property that is about to be renamed.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))


def scored(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Return the log-prob of each token by one plain forward pass over the right-padded batch."""
    training = model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    model.train(training)
    logp = (logits[:, :-1] / temperature).log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    return torch.nn.functional.pad(logp, (1, 0))


def gap(model: Any, rollouts: Sequence[Rollout], temperature: float = 1.0, tolerance: float = ON_POLICY) -> float:
    batch = collate(rollouts, 0)
    return check_on_policy(rollouts, scored(model, batch, temperature), batch, tolerance)
