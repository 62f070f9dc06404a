"""What a live training is refused for when it is attached to, and what can only be seen in its steps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from fx_influence.interop.optimizers import require_adamw
from fx_influence.interop.trl.capture import METHODS, CaptureError
from fx_influence.interop.trl.generation import mean_distance
from fx_influence.interop.trl.prompts import IMAGES
from fx_influence.interop.trl.ranks import check_processes


def check_kind(trainer: Any) -> None:
    """Raise ``TypeError`` for a trainer of another kind, ``ValueError`` for processes without the whole model each."""
    kind = type(trainer).__name__
    if not all(hasattr(trainer, name) for name in (*METHODS, "_generate", "_metrics", "accelerator")):
        raise TypeError(f"trainer is {kind}; attach to trl's GRPOTrainer or RLOOTrainer (trl 1.16 or later)")
    check_processes(trainer)


def check_steps(trainer: Any) -> None:
    """Raise for a trainer whose steps cannot be attributed, naming the remedy.

    Raises ``TypeError`` for another optimizer than AdamW, and ``ValueError`` for active dropout, noise on the
    embeddings, images, a quantised model, and a head in another precision than the model.
    """
    model = trainer.model
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is quantised, which has no exact derivatives; attach to one in bfloat16 or float32")
    if getattr(trainer.args, "cast_lm_head_to_fp32", False) and model.dtype != torch.float32:
        raise ValueError(f"cast_lm_head_to_fp32 is True over a model in {model.dtype}; load it in float32 instead")
    for name, p in _active_dropout(model):
        raise ValueError(
            f"{name or 'the model'} has dropout {p}, which makes every gradient another one; set disable_dropout=True "
            "in the trainer's config, and the dropouts of the model's config and of LoRA to 0"
        )
    for name, alpha in _noise(trainer):
        raise ValueError(
            f"{name} is {alpha}: noise on the embeddings makes every gradient one of another policy than the one that "
            "samples; leave neftune_noise_alpha out to measure"
        )
    _check_images(trainer)
    check_optimizer(trainer)


def _active_dropout(model: nn.Module) -> Iterator[tuple[str, float]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield name, module.p
        # Attention of Llama's kind keeps the probability as a number and drops by a function.
        for field, value in vars(module).items():
            if "dropout" in field and isinstance(value, float) and value > 0:
                yield f"{name}.{field}", value


def _noise(trainer: Any) -> Iterator[tuple[str, Any]]:
    for holder in (trainer, trainer.args, *trainer.model.modules()):
        alpha = vars(holder).get("neftune_noise_alpha")
        if alpha:
            yield "neftune_noise_alpha", alpha


def _check_images(trainer: Any) -> None:
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    for name in IMAGES:
        if name in columns:
            raise ValueError(
                f"train_dataset has the column {name!r}: the policy reads images, which influences do not see; train "
                "on text to measure"
            )


def check_optimizer(trainer: Any) -> None:
    """Raise ``TypeError`` where the trainer's optimizer is not AdamW, or the one that it is going to make."""
    optimizer = trainer.optimizer
    if optimizer is None and type(trainer).create_optimizer is Trainer.create_optimizer:
        optimizer = _optimizer_to_come(trainer)
    if optimizer is not None:
        require_adamw(optimizer)


def _optimizer_to_come(trainer: Any) -> Any:
    """One of the kind and settings, over a parameter of no consequence; None where only the trainer can tell."""
    asked = trainer.optimizer_cls_and_kwargs
    try:
        kind, settings = asked or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        return kind([nn.Parameter(torch.zeros(1))], **settings)
    except Exception:
        # A library that is not installed, or settings by layer: the training's beginning tells.
        return None


def calling_trainer(callback: TrainerCallback) -> Any:
    """The trainer among whose callbacks this one is and whose event is being handled; None outside of events.

    No event names its trainer, and nothing that it hands over does. But it is the trainer that is calling.
    """
    frame = sys._getframe(1)
    while frame is not None:
        for value in list(frame.f_locals.values()):
            if issubclass(type(value), Trainer) and any(x is callback for x in value.callback_handler.callbacks):
                return value
        frame = frame.f_back  # type: ignore[assignment]
    return None


def rounding_bound(trainer: Any) -> float:
    """How far two forwards of a policy may differ by rounding, in nats a token on average: 2 sqrt(eps).

    eps: of the lowest precision in use, the weights', the trainer's autocast's or, of float32 on a GPU, TF32's.
    """
    dtypes = [p.dtype for p in trainer.model.parameters() if p.is_floating_point()]
    lowest = max(torch.finfo(dtype).eps for dtype in dtypes)
    lowest = max(lowest, {"fp16": 2.0**-10, "bf16": 2.0**-7}.get(trainer.accelerator.mixed_precision, 0.0))
    if trainer.accelerator.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        lowest = max(lowest, 2.0**-10)
    if getattr(trainer, "use_vllm", False):
        lowest = max(lowest, 2.0**-7)
    return float(2 * lowest**0.5)


def check_scored(captured: Tensor, scored: Tensor, bound: float) -> None:
    """Raise ``CaptureError`` where the trainer's log-probs of completion tokens are not those of the policy.

    ``captured``, ``scored``: of the same tokens, any shape. ``bound``: on their mean distance by rounding, in nats.
    """
    gap = mean_distance(captured, scored)
    if not gap <= bound:
        raise CaptureError(
            f"the trainer's log-probabilities of its rollouts and those of the model by ids and masks alone differ by "
            f"{gap:.2g} nats a token on average, rounding by at most {bound:.2g}: something else goes into the "
            "trainer's forward (images, noise, prompts that are learned, hooks); train without it to measure"
        )
