"""Find what makes a model's gradients random or inexact, so that its steps cannot be attributed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fx_influence.policy.four_bit import four_bit_layers


def check_not_quantised(model: Any) -> None:
    """Raise ``ValueError`` for a quantised model of Hugging Face, unless its quantised layers are frozen 4-bit ones.

    Those of bitsandbytes, under an adapter (QLoRA), are linear maps; ``make_functional`` checks them.
    """
    if getattr(model, "hf_quantizer", None) is not None and not four_bit_layers(model):
        raise ValueError(
            "the model is quantised; expected bfloat16, float32 or bitsandbytes' 4-bit weights under an adapter, since "
            "other quantised ones have no exact derivatives. Load it with load_in_4bit, or without quantisation"
        )


def active_dropout(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Yield the name and probability of every dropout of the model that is not 0."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield name, module.p
        # Attention of Llama's kind keeps the probability as a number and calls the dropout function.
        for field, value in vars(module).items():
            if "dropout" in field and isinstance(value, float) and value > 0:
                yield f"{name}.{field}", value


def embedding_noise(*owners: object) -> Iterator[tuple[str, Any]]:
    """Yield every setting of NEFTune that is on in modules, a trainer or its settings."""
    for owner in owners:
        alpha = vars(owner).get("neftune_noise_alpha")
        if alpha:
            yield "neftune_noise_alpha", alpha
