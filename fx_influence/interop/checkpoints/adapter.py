"""PEFT adapters loaded onto their base model, with their weights checked against the adapter's config."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fx_influence.interop.checkpoints.files.directory import read_adapter_config, reporting_damage
from fx_influence.interop.checkpoints.layout import SavedWeights


def load_adapter(
    model: Any, path: Path, weights: SavedWeights | None, dtype: torch.dtype | None, config: Any = None
) -> Any:
    """Put the adapter of a directory on its base model.

    Args:
        model: the base model.
        path: directory with ``adapter_config.json``, and with the weights unless these are given.
        weights: in other files than those of peft; None to read these in ``path``.
        dtype: of all parameters; None leaves them as loaded.
        config: of peft; None to read it in ``path``.

    Returns:
        The ``PeftModel``, of which only the adapter is trainable.

    Raises:
        ImportError: without peft.
        ValueError: for weights that are damaged or do not fit the config.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("a PEFT adapter needs peft: pip install 'fx-influence[peft]'") from error

    with warnings.catch_warnings():
        # The first is an error below; the second is about peft's own use of transformers.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        try:
            with reporting_damage("the adapter", path):
                if weights is None:
                    adapted, saved = _adapter_of_files(model, path)
                else:
                    adapted, saved = _adapter_of_tensors(model, config or read_adapter_config(path), weights)
            misfit = _adapter_misfit(adapted, saved)
        except RuntimeError as error:
            misfit = str(error)
    if misfit:
        place = weights.path if weights else path
        raise ValueError(
            f"the adapter's weights in {place} do not fit its adapter_config.json: {misfit}; expected the weights that "
            "it describes. Save adapter and config together with save_pretrained, or the weights with "
            "torch.distributed.checkpoint"
        )
    return adapted if dtype is None else adapted.to(dtype)


def _adapter_misfit(adapted: Any, saved: dict[str, Tensor]) -> str:
    """Return what the saved weights lack, by the model's names or by peft's; an empty string if nothing."""
    from peft import get_peft_model_state_dict

    names, trainable = set(saved), _trainable_names(adapted)
    if trainable <= names:
        return ""
    missing = sorted(set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - names)
    if missing:
        return f"missing are {missing[:5]} ({len(missing)} in all)"
    if len(names) < len(trainable):
        return (
            f"{len(names)} tensors stand for {len(trainable)} trained parameters (peft before 0.21 saves no biases of "
            "bias='lora_only')"
        )
    return ""


def _trainable_names(model: Any) -> set[str]:
    """Return the names of the trainable parameters."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _adapter_of_files(model: Any, path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Load the adapter and its saved weights with peft."""
    from peft import PeftModel
    from peft.utils import load_peft_weights

    adapted = PeftModel.from_pretrained(model, str(path), is_trainable=True, local_files_only=True)
    return adapted, load_peft_weights(str(path), device="cpu", local_files_only=True)


def _adapter_of_tensors(model: Any, config: Any, weights: SavedWeights) -> tuple[Any, dict[str, Tensor]]:
    """Load the adapter and its saved weights from tensors by name."""
    from peft import get_peft_model, set_peft_model_state_dict

    adapted = get_peft_model(model, config)
    saved = weights.read()
    if _trainable_names(adapted) <= set(saved):
        # These are the weights of the complete model; accelerate saves only the adapter, under peft's names.
        adapted.load_state_dict(saved, strict=False)
    else:
        # A copy, since older peft renames keys in its argument.
        set_peft_model_state_dict(adapted, dict(saved))
    return adapted, saved
