"""Trainers whose steps cannot be attributed are refused, with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trl_runs import HELD_OUT, PLAIN, assert_detached, gpt2
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from benchmarks.trl.variants import policy, trainer
from fx_influence.interop.trl import EntropyInfluence

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]


def with_lora_dropout() -> Any:
    return get_peft_model(policy(), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))


def with_attention_dropout() -> Any:
    model = policy()
    model.model.layers[1].self_attn.attention_dropout = 0.2
    return model


def frozen() -> Any:
    return policy().requires_grad_(False)


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (gpt2, r"drop has dropout 0.1; expected 0.*disable_dropout=True"),
        (with_lora_dropout, r"lora_dropout.default has dropout 0.1"),
        (with_attention_dropout, r"layers.1.self_attn.attention_dropout has dropout 0.2"),
        (frozen, "none with requires_grad"),
    ],
    ids=["dropout", "LoRA dropout", "attention dropout", "frozen"],
)
def test_attach_rejects_model(make_model: Any, message: str, tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    training.model = make_model()
    with pytest.raises(ValueError, match=message):
        EntropyInfluence(1, HELD_OUT).attach(training)
    assert_detached(training)


def test_attach_rejects_other_optimizer(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1, optim="sgd")
    with pytest.raises(TypeError, match="SGD"):
        EntropyInfluence(1, HELD_OUT).attach(training)


def test_training_warns_of_other_optimizer_known_late(tmp_path: Path) -> None:
    """A trainer that makes its optimizer in its own way cannot be refused before training begins."""
    training = trainer(PLAIN, str(tmp_path), 2)
    kind = type(training)

    class Late(kind):  # type: ignore[valid-type, misc]
        def create_optimizer(self, *_: Any) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
            return self.optimizer

    training.__class__ = Late
    influence = EntropyInfluence(1, HELD_OUT).attach(training)
    with pytest.warns(UserWarning, match="no step of this training run is measured: optimizer is .*SGD"):
        training.train()
    assert training.state.global_step == 2
    assert not influence.history


def test_attach_rejects_other_trainer(tmp_path: Path) -> None:
    other = Trainer(policy(), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    with pytest.raises(TypeError, match="trainer is Trainer; expected trl's GRPOTrainer or RLOOTrainer"):
        EntropyInfluence(1, HELD_OUT).attach(other)


def test_attach_rejects_embedding_noise(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match="neftune_noise_alpha is 5"):
        EntropyInfluence(1, HELD_OUT).attach(training)


@pytest.mark.parametrize("column", ["image", "images"])
def test_attach_rejects_images_with_held_out_prompts(column: str, tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    training.train_dataset = training.train_dataset.add_column(column, ["a picture"] * len(training.train_dataset))
    with pytest.raises(ValueError, match="E is 3 held-out prompts and rollouts show images"):
        EntropyInfluence(1, HELD_OUT).attach(training)


@pytest.mark.parametrize("name", ["every", "completions_per_prompt", "max_prompts"])
def test_counts_below_one_are_rejected(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        EntropyInfluence(**{name: 0})  # type: ignore[arg-type]
