"""The causal language model of a checkpoint directory, from Hugging Face files or from tensors by name."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fx_influence.interop.checkpoints.files.directory import reporting_damage
from fx_influence.interop.checkpoints.layout import SavedWeights


def load_causal_lm(path: Path, weights: SavedWeights | None, dtype: torch.dtype | None) -> Any:
    """Load the causal language model of a directory.

    Args:
        path: directory with ``config.json``, and with the weights unless these are given.
        weights: in other files than those of transformers; None to read these in ``path``.
        dtype: of the parameters; None for the saved one.

    Raises:
        ValueError: for weights that are damaged, hold more than tensors, or do not fit the config.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    loader: Any = AutoModelForCausalLM
    options = {"local_files_only": True, "weights_only": True, "ignore_mismatched_sizes": True}
    try:
        with reporting_damage("the weights", path):
            if weights is None:
                model, report = loader.from_pretrained(
                    path, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True, **options
                )
            else:
                model, report = _from_tensors(path, weights.read(), dtype, options)
            if (path / "generation_config.json").is_file():
                # Read again, since transformers leaves out one that is damaged, and with it ends of sequences.
                model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the weights in {path} hold more than tensors, which are never unpickled; expected tensors alone. "
            "Save the model as safetensors"
        ) from error
    # transformers fills missing or mismatched weights with random numbers and only warns.
    misfits = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if misfits:
        place = weights.path if weights else path
        raise ValueError(
            f"the weights in {place} do not fit {path / 'config.json'}: missing or of another shape are "
            f"{misfits[:5]} ({len(misfits)} in all); expected the weights that it describes. Save model and config "
            "together with save_pretrained"
        )
    return model


def _from_tensors(
    path: Path, weights: dict[str, Any], dtype: torch.dtype | None, options: dict[str, Any]
) -> tuple[Any, Any]:
    """Build the model of a config, load tensors into it, and return it with the report of misfits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        loader: Any = type(AutoModelForCausalLM.from_config(config))
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    floats = [value.dtype for value in tensors.values() if value.is_floating_point()]
    dtype = dtype or functools.reduce(torch.promote_types, floats or [torch.float32])
    model, report = loader.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, **options
    )
    return model, report
