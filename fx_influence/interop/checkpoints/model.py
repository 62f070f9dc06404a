"""Causal language models of a checkpoint directory"""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fx_influence.interop.checkpoints.dcp.read import read_values
from fx_influence.interop.checkpoints.directory import (
    MODEL_KEYS,
    reporting_damage,
)

if TYPE_CHECKING:
    pass


def load_causal_lm(path: Path, shards: Path | None, dtype: torch.dtype | None) -> Any:
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    options = {"local_files_only": True, "weights_only": True, "ignore_mismatched_sizes": True}
    try:
        with reporting_damage("the weights", path):
            if shards is None:
                model, report = loader.from_pretrained(
                    path, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True, **options
                )
            else:
                model, report = _from_shards(path, read_values(shards, MODEL_KEYS), dtype, options)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the weights in {path} hold more than tensors, which are never unpickled; save the model as safetensors"
        ) from error
    # transformers fills what is missing or mismatched with random numbers and only warns
    bad = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if bad:
        raise ValueError(
            f"the weights in {shards or path} do not fit {path / 'config.json'}: missing or of another shape are "
            f"{bad[:5]} ({len(bad)} in all); save model and config together with save_pretrained"
        )
    return model


def _from_shards(
    path: Path, weights: dict[str, Any], dtype: torch.dtype | None, options: dict[str, Any]
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        loader: Any = type(AutoModelForCausalLM.from_config(config))
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    floats = [value.dtype for value in tensors.values() if value.is_floating_point()]
    dtype = dtype or functools.reduce(torch.promote_types, floats or [torch.float32])
    model, report = loader.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, **options
    )
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model, report
