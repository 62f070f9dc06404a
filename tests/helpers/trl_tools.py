"""TRL training runs of a tiny policy whose completions hold what it did not sample: tools, environments, turns."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from benchmarks.trl.variants import CHARACTERS, QUIET_ON_CPU

CALL = '<call>{"name": "count", "arguments": {"upto": 3}}</call>'
"""One token, so that an untrained policy calls the tool often."""

WORDS = ["<pad>", "<end>", "<user>", "<assistant>", "<tool>", CALL, "count", "upto", "dummy", *CHARACTERS]

CHAT_TEMPLATE = """{% for message in messages %}<{{ message.role }}>{{ message.content }}\
{% for call in message.tool_calls or [] %}<call>{"name": "{{ call.function.name }}", "arguments": \
{{ call.function.arguments | tojson }}}</call>{% endfor %}{% if message.role == "assistant" %}<end>{% endif %}\
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": "<end>", "content": "text"},
    },
}

FIVE_PROMPTS = ["1+2", "3", "4+4=", "5", "60+7"]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a chat template of tools and a template that reads their calls."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("<call>.*?</call>|<[a-z]+>|count|upto|dummy|."), "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


def calling_policy(seed: int = 0) -> Any:
    """Return a Qwen2 of two layers that ends its turns and calls the tool more often than an untrained one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = Qwen2Config(
            vocab_size=len(WORDS),
            num_key_value_heads=1,
            max_position_embeddings=128,
            initializer_range=0.4,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            **sizes,
        )
        model = Qwen2ForCausalLM(config)
        head = model.lm_head.weight.data
        head[1], head[5] = head[1] * 1.5, head[5] * 1.5
        return model


def count(upto: int) -> str:
    """Count from 1.

    Args:
        upto: last number.

    Returns:
        The numbers.
    """
    return "123456789"[:upto]


class Counter:
    """An environment with a tool, whose start differs between the rollouts of a prompt."""

    resets = 0

    def reset(self, **columns: Any) -> str:
        Counter.resets += 1
        return "0123456789"[Counter.resets % 10]

    def count(self, upto: int) -> str:
        """Count from 1.

        Args:
            upto: last number.

        Returns:
            The numbers.
        """
        return "123456789"[:upto]


def two_turns(prompts: list[Any], trainer: Any, temperature: float = 1.0) -> dict[str, Any]:
    """Sample two turns of at most four tokens for each prompt with an answer of a user between, as a ``rollout_func``.

    A turn that no ``<end>`` closes is cut off there. Prompts begin with a digit that differs between the rollouts.
    The log-probabilities are those at ``temperature``.
    """
    tokenizer, model = trainer.processing_class, trainer.model
    answer = tokenizer("<user>7<assistant>", add_special_tokens=False)["input_ids"]
    result: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    for k, prompt in enumerate(prompts):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        ids = [WORDS.index(str(k % 10)), *ids]
        completion: list[int] = []
        logprobs: list[float] = []
        mask: list[int] = []
        for turn in range(2):
            if turn:
                completion, logprobs, mask = [*completion, *answer], [*logprobs, 0.0, 0.0, 0.0], [*mask, 0, 0, 0]
            for _ in range(4):
                with torch.no_grad():
                    scores = model(torch.tensor([[*ids, *completion]])).logits[0, -1].div(temperature).log_softmax(-1)
                token = int(torch.multinomial(scores.exp(), 1))
                completion, logprobs, mask = [*completion, token], [*logprobs, float(scores[token])], [*mask, 1]
                if token == tokenizer.eos_token_id:
                    break
        for name, value in zip(result, (ids, completion, logprobs, mask), strict=True):
            result[name].append(value)
    return result


def text_reward(completions: list[Any], **columns: Any) -> list[float]:
    """Return rewards that differ between the completions of a prompt."""
    texts = ["".join(message["content"] for message in messages) for messages in completions]
    return [0.1 * len(text) + text.count("7") - text.count("3") for text in texts]


def tool_trainer(out: str, steps: int = 2, sources: dict[str, Any] | None = None, **options: Any) -> Any:
    """Return a ``GRPOTrainer`` of conversations of five prompts.

    Args:
        out: its output directory.
        steps: number of optimizer steps.
        sources: its ``tools``, ``environment_factory`` or ``rollout_func``; None for the tool ``count``.
        **options: further options of the config.
    """
    config: dict[str, Any] = {
        "output_dir": out,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 15,
        "num_generations": 3,
        "max_completion_length": 24,
        "max_steps": steps,
        "optim": "adamw_torch",
        **QUIET_ON_CPU,
        **options,
    }
    return GRPOTrainer(
        model=calling_policy(),
        args=GRPOConfig(**config),
        reward_funcs=text_reward,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": x}]} for x in FIVE_PROMPTS]),
        processing_class=chat_tokenizer(),
        **({"tools": [count]} if sources is None else sources),
    )
