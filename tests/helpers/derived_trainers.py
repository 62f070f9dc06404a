"""Stand-ins of trainers derived from TRL's ``GRPOTrainer``, rebuilt after the sources of ms-swift and Unsloth.

ms-swift of 2026-08-22, commit 3602360 (``swift/rlhf_trainers/grpo_trainer.py``, ``swift/rl_core/data.py``); Unsloth of
2026-08-22, commit 015bdef (``unsloth/models/rl_replacements.py``). Only what the capture meets is rebuilt: the methods'
names and arguments, the inputs of the loss, and what the scoring returns.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from benchmarks.trl.variants import PROMPTS, QUIET_ON_CPU, policy, reward, tokenizer


@dataclass
class GRPOBatch:
    """Fields of ms-swift's dataclass of the same name that its loss ``bnpo`` reads."""

    completion_mask: Tensor
    advantages: Tensor
    old_per_token_logps: Tensor | None
    logits_to_keep: int


class SwiftTrainer(GRPOTrainer):
    """ms-swift's trainer: inputs of the loss are the model's inputs and a ``GRPOBatch``."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        model_inputs = {
            "input_ids": torch.cat([output["prompt_ids"], output["completion_ids"]], 1),
            "attention_mask": torch.cat([output["prompt_mask"], output["completion_mask"]], 1),
        }
        mask = output["completion_mask"].bool()
        advantages = output["advantages"][:, None].expand(mask.shape)
        batch = GRPOBatch(mask, advantages, None, mask.shape[1])
        with torch.no_grad():
            batch.old_per_token_logps = self._get_per_token_logps_and_entropies(self.model, model_inputs, batch)[0]
        return {"model_inputs": model_inputs, "grpo_batch": batch}

    def _prepare_inputs(self, inputs: Any) -> Any:
        return self._generate_and_score_completions(inputs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = inputs["grpo_batch"]
        logps, _ = self._get_per_token_logps_and_entropies(model, inputs["model_inputs"], batch)
        ratio = (logps - batch.old_per_token_logps).exp()
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        per_token = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
        return (per_token * batch.completion_mask).sum() / batch.completion_mask.sum().clamp(min=1.0)

    def _get_per_token_logps_and_entropies(  # type: ignore[override]
        self, model: Any, model_inputs: dict[str, Any], grpo_batch: GRPOBatch, compute_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        keep = grpo_batch.logits_to_keep
        logits = model(**model_inputs, use_cache=False, logits_to_keep=keep + 1).logits[:, -(keep + 1) : -1]
        log_probs = (logits / self.temperature).log_softmax(-1)
        logps = log_probs.gather(-1, model_inputs["input_ids"][:, -keep:, None]).squeeze(-1)
        return logps, -(log_probs.exp() * log_probs).sum(-1) if compute_entropy else None


class UnslothTrainer(GRPOTrainer):
    """Unsloth's trainer: the scoring that its loss calls returns None."""

    def _get_per_token_logps_and_entropies(  # type: ignore[override]
        self,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        logits_to_keep: Any,
        batch_size: Any = None,
        compute_entropy: bool = False,
        compute_efficient: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return None, None


def derived_trainer(kind: type[GRPOTrainer], out: str, steps: int = 2) -> Any:
    """Return a trainer of a derived class on a tiny policy, five prompts a step with three completions each."""
    args = GRPOConfig(
        output_dir=out,
        learning_rate=1e-3,
        per_device_train_batch_size=15,
        num_generations=3,
        max_completion_length=6,
        max_steps=steps,
        optim="adamw_torch",
        **QUIET_ON_CPU,
    )
    return kind(
        model=policy(),
        args=args,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS[:5]]),
        processing_class=tokenizer(),
    )


@contextmanager
def swift_installed() -> Iterator[type[SwiftTrainer]]:
    """Make ``swift.rlhf_trainers.grpo_trainer`` importable, with a fresh subclass of the stand-in inside."""
    names = ("swift", "swift.rlhf_trainers", "swift.rlhf_trainers.grpo_trainer")
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    kind = type("SwiftTrainer", (SwiftTrainer,), {})
    modules[names[-1]].GRPOTrainer = kind
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(modules)
    try:
        yield kind
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
