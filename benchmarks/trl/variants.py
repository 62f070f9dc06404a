"""Real TRL training runs of a tiny policy, one for each combination of a loss and its options."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

CHARACTERS = "0123456789+="
END = "<|endoftext|>"
"""Token that Qwen2's tokenizer class, with which a saved policy is read, would add if it were missing."""
LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "bnpo": {},
    "dr_grpo": {},
    "dapo": {},
    "cispo": {"epsilon_high": 5.0},
    "luspo": {"importance_sampling_level": "sequence"},
    "sapo": {},
    "vespo": {},
}


class Variant(NamedTuple):
    """A training run: ``options`` of its config, beside those that ``trainer`` gives to all."""

    loss: str
    lora: bool
    accumulation: int
    off_policy: bool
    options: dict[str, Any]

    @property
    def name(self) -> str:
        words = [self.loss, "LoRA" if self.lora else "full", f"{self.accumulation} micro-batches"]
        words += ["off-policy"] if self.off_policy else []
        return ", ".join([*words, *(f"{key}={value}" for key, value in self.options.items())])


def variants() -> Iterator[Variant]:
    """Yield every loss by trained weights, accumulation, policy and bonus; then GSPO, KL, masks, clipping and RLOO."""
    for loss, lora, accumulation, off_policy, bonus in itertools.product(
        LOSSES, (False, True), (1, 3), (False, True), (0.0, 0.05)
    ):
        yield Variant(loss, lora, accumulation, off_policy, {"entropy_coef": bonus} if bonus else {})
    for lora, off_policy in itertools.product((False, True), (False, True)):
        for options in (
            {"importance_sampling_level": "sequence"},
            {"beta": 0.1},
            {"top_entropy_quantile": 0.5, "entropy_coef": 0.05},
            {"mask_truncated_completions": True},
            {"delta": 1.1, "temperature": 0.7},
            {"max_grad_norm": 0.01, "weight_decay": 0.1},
            {"optim": "adamw_torch", "max_grad_norm": 0.0},
        ):
            yield Variant("grpo", lora, 1 if lora else 3, off_policy, options)
        for accumulation, options in ((1, {}), (3, {"beta": 0.1})):
            yield Variant("rloo", lora, accumulation, off_policy, options)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character and a separate padding token."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", END, *CHARACTERS])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token=END)


def policy(seed: int = 0, hidden_size: int = 16, intermediate_size: int = 24, spread: float = 0.4) -> Any:
    """Return a Qwen2 of two layers whose completions end after a few tokens.

    Args:
        seed: of its weights.
        hidden_size: width of its layers.
        intermediate_size: width within its MLPs.
        spread: standard deviation of its weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=len(CHARACTERS) + 2,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            initializer_range=spread,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
        model = Qwen2ForCausalLM(config)
        # A new model embeds its padding token as 0, where the following norm is far from linear, and this untrained
        # policy samples it.
        model.get_input_embeddings().weight.data[0].normal_(std=spread)
        return model


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Return rewards that differ between the completions of a prompt."""
    return [0.3 * len(text) + text.count("7") - text.count("3") for text in completions]


PROMPTS = ["1+2=", "3+44=", "5=", "60+7=", "8+9+1=", "2+2="]


QUIET_ON_CPU: dict[str, Any] = {
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
"""Options of every trainer of the benchmarks: float32 on a CPU, every step logged, nothing written or shown."""


def trainer(variant: Variant, out: str, steps: int = 3, model: Any = None, **more: Any) -> Any:
    """Return a trainer, ready to train; it makes two steps on every batch if off-policy.

    Args:
        variant: the loss and its options.
        out: its output directory.
        steps: number of optimizer steps.
        model: model to train in place of ``policy()``.
        more: further options of the config.
    """
    rloo = variant.loss == "rloo"
    config: dict[str, Any] = {
        "output_dir": out,
        "learning_rate": 0.02,
        "weight_decay": 0.05,
        "per_device_train_batch_size": 6,
        "num_generations": 3,
        "gradient_accumulation_steps": variant.accumulation,
        "num_iterations": 2 if variant.off_policy else 1,
        "max_completion_length": 6,
        "max_steps": steps,
        **QUIET_ON_CPU,
        "optim": "adamw_torch",
        **({} if rloo else {"loss_type": variant.loss, **LOSSES[variant.loss]}),
        **variant.options,
        **more,
    }
    # The reference model of a loss with a KL term is read from the directory of the policy.
    (policy() if model is None else model).save_pretrained(f"{out}/policy")
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    return (RLOOTrainer if rloo else GRPOTrainer)(
        model=AutoModelForCausalLM.from_pretrained(f"{out}/policy", dtype=torch.float32),
        args=(RLOOConfig if rloo else GRPOConfig)(**config),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer(),
        peft_config=lora if variant.lora else None,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of trainers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with open(os.devnull, "w") as devnull, redirect_stdout(devnull):
        yield


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Make accelerate shard the models of trainers that are made inside; on a CPU it would replicate them.

    It does so for processes of the kind ``MULTI_GPU``, of which nothing else depends here: the device stays the CPU and
    the collectives gloo's.
    """
    init = PartialState.__init__

    def init_as_gpus(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self._shared_state["distributed_type"] is DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    with patch.object(PartialState, "__init__", init_as_gpus):
        yield


def prepare_deepspeed() -> None:
    """Make DeepSpeed run on the CPU, by gloo alone: its operator for shared memory would be compiled first."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False


def zero_config(stage: int, zero: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Return a configuration of DeepSpeed, with what the trainer fills in.

    Args:
        stage: of ZeRO.
        zero: further settings of it.
        more: further sections.
    """
    auto = ("gradient_clipping", "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    return {"zero_optimization": {"stage": stage, **(zero or {})}, **dict.fromkeys(auto, "auto"), **more}
