"""Check that a live trainer is of a kind whose steps can be attributed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from fx_influence.interop.live.model_checks import active_dropout, check_not_quantised, embedding_noise
from fx_influence.interop.optimizers import require_adamw
from fx_influence.interop.trl.capture.micro_batch import SCORE
from fx_influence.interop.trl.capture.recorder import METHODS


def check_kind(trainer: Any) -> None:
    """Raise ``TypeError`` for another trainer than trl's, and for a derived one whose loss is out of reach."""
    kind = type(trainer).__name__
    if not all(hasattr(trainer, name) for name in (*METHODS, "_generate", "_metrics", "accelerator")):
        raise TypeError(f"trainer is {kind}; expected trl's GRPOTrainer or RLOOTrainer (trl 1.16 or later)")
    parameters = inspect.signature(getattr(type(trainer), SCORE)).parameters
    if "compute_efficient" in parameters:
        raise TypeError(
            f"trainer is {kind}, whose loss Unsloth computes beside {SCORE}, inside one function that gives no "
            "log-probabilities; expected trl's own loss, which gives the coefficients. Train without importing "
            "unsloth to measure (8-bit AdamW and 4-bit weights under LoRA may stay), or read its checkpoints and "
            "rollouts with fx.load_checkpoint and fx.read_rollouts"
        )
    if "input_ids" not in parameters and {"model", "grpo_batch"} <= parameters.keys():
        raise TypeError(
            f"trainer is {kind}, whose {SCORE} takes {', '.join(list(parameters)[1:4])} as ms-swift's does; expected "
            "trl's arguments. Add the lines for ms-swift in fx_influence/interop/README.md, which measure it by "
            "fx.attach"
        )


def check_steps(trainer: Any) -> None:
    """Check that the trainer's steps can be attributed to rollouts.

    Raises:
        TypeError: for another optimizer than AdamW.
        ValueError: for active dropout, noise on the embeddings, a quantised model, and a head in another
            precision than the model. Each names the remedy.
    """
    model = trainer.model
    check_not_quantised(model)
    if getattr(trainer.args, "cast_lm_head_to_fp32", False) and model.dtype != torch.float32:
        raise ValueError(
            f"cast_lm_head_to_fp32 is True over a model in {model.dtype}; expected False. Load the model in "
            "float32 instead"
        )
    for name, p in active_dropout(model):
        raise ValueError(
            f"{name or 'the model'} has dropout {p}; expected 0, since it makes every gradient random. Set "
            "disable_dropout=True in the trainer's config, and the dropouts of the model's config and of LoRA to 0"
        )
    for name, alpha in embedding_noise(trainer, trainer.args, *model.modules()):
        raise ValueError(
            f"{name} is {alpha}; expected None, since noise on the embeddings makes every gradient one of another "
            "policy than the one that samples. Leave neftune_noise_alpha out to measure"
        )
    _check_optimizer(trainer)


def _check_optimizer(trainer: Any) -> None:
    """Raise ``TypeError`` where the trainer's optimizer, or the one that it is going to make, is not AdamW."""
    optimizer = trainer.optimizer
    if optimizer is None and type(trainer).create_optimizer is Trainer.create_optimizer:
        optimizer = _future_optimizer(trainer)
    if optimizer is not None:
        require_adamw(optimizer)


def _future_optimizer(trainer: Any) -> Any:
    """Return an optimizer of the kind and settings that the trainer will make, over a parameter that is not trained.

    None where only the trainer can make it.
    """
    chosen = trainer.optimizer_cls_and_kwargs
    try:
        kind, settings = chosen or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        return kind([nn.Parameter(torch.zeros(1))], **settings)
    except Exception:
        # A library that is not installed, or settings by layer: the optimizer is checked when training begins.
        return None
