"""Adapters in files of ranks, as verl saves LoRA: their config, and their weights apart from the base model's.

verl saves the weights of the ``PeftModel``; with ``save_lora_only`` the adapter's alone. Of the config it saves rank
and alpha (``lora_train_meta.json``); older versions saved all of it (``lora_adapter/adapter_config.json``). Which
modules are adapted follows from the names. Source: verl-project/verl at commit 1dda039,
verl/utils/checkpoint/fsdp_checkpoint_manager.py and verl/workers/engine/fsdp/transformer_impl.py
(``_build_lora_module``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fx_influence.interop.checkpoints.files.directory import read_adapter_config
from fx_influence.interop.checkpoints.files.unpickle import load_inert

CONFIGS = ("adapter_config.json", "lora_adapter/adapter_config.json")
META = "lora_train_meta.json"
_PREFIX = "base_model.model."


class RankAdapter(NamedTuple):
    """An adapter in files of ranks.

    Attributes:
        config: of peft.
        alone: whether the weights of its base model are elsewhere.
    """

    config: Any
    alone: bool


def rank_adapter(files: Sequence[Path]) -> RankAdapter | None:
    """Return the adapter whose weights are in the files of ranks; None if these have none.

    Args:
        files: of the model, one a rank; may be empty.

    Raises:
        ImportError: without peft.
        ValueError: if neither its config nor its rank and alpha are beside the files.
    """
    saved = load_inert(files[0]) if files else {}
    names = list(map(str, saved)) if isinstance(saved, dict) else []
    if not any(map(_is_adapted, names)):
        return None
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("a PEFT adapter needs peft: pip install 'fx-influence[peft]'") from error
    return RankAdapter(_config(files[0].parent, names), all(map(_is_adapted, names)))


def split_weights(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the base model's weights by its own names, and the adapter's by those of the ``PeftModel``.

    Example:
        >>> import torch
        >>> names = ["base_model.model.h.q.base_layer.weight", "base_model.model.h.q.lora_A.default.weight"]
        >>> base, adapter = split_weights(dict.fromkeys(names, torch.ones(1)))
        >>> list(base), list(adapter)
        (['h.q.weight'], ['base_model.model.h.q.lora_A.default.weight'])
    """
    adapter = {name: value for name, value in weights.items() if _is_adapted(name)}
    base = {
        name.removeprefix(_PREFIX).replace(".base_layer.", "."): value
        for name, value in weights.items()
        if name not in adapter
    }
    return base, adapter


def _is_adapted(name: str) -> bool:
    return ".lora_" in name


def _config(directory: Path, names: Sequence[str]) -> Any:
    """Return peft's config, as saved or from what verl saves of it."""
    from peft import LoraConfig

    for file in CONFIGS:
        if (directory / file).is_file():
            return read_adapter_config((directory / file).parent)
    if not (directory / META).is_file():
        raise ValueError(
            f"{directory} has weights of LoRA, and neither {META} nor {' nor '.join(CONFIGS)}; expected one of them, "
            "for lora_alpha. Save peft's config there with model.peft_config['default'].save_pretrained"
        )
    meta = json.loads((directory / META).read_text())
    modules = {name.partition(".lora_")[0] for name in names if _is_adapted(name)}
    layers = {name.removesuffix(".base_layer.weight") for name in names if name.endswith(".base_layer.weight")}
    if layers and (other := sorted(modules - layers)):
        raise ValueError(
            f"{directory} has weights of LoRA for {other[0]}, which is no layer with one weight; expected peft's "
            f"config, since {META} does not say what target_parameters is. Save it there with "
            "model.peft_config['default'].save_pretrained"
        )
    targets = sorted(module.removeprefix(_PREFIX) for module in modules)
    return LoraConfig(
        task_type="CAUSAL_LM", r=meta["r"], lora_alpha=meta["lora_alpha"], target_modules=targets, bias="none"
    )
