"""Contents of the flat parameters of FSDP1, which follow from the model's architecture.

FSDP1 puts the parameters of each unit, in the order of its modules, into one vector, padded so that ranks have equal
shares. Without ``use_orig_params`` the optimizer has these vectors as parameters. verl wraps the classes that the model
names in ``_no_split_modules``, each trainable matrix of LoRA, and then the root, whose vector is the first parameter.
Source: torch 2.13, ``torch.distributed.fsdp._flat_param``; verl-project/verl, verl/utils/fsdp_utils.py at commit
1dda039 (``get_fsdp_wrap_policy``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn


class FlatUnit(NamedTuple):
    """Parameters that ranks divide as one vector.

    Attributes:
        name: of the module whose parameters they are, or of a single one.
        shapes: of the parameters, in the order of the vector.
        padded: whether ranks have equal shares, the last ones filled up.
    """

    name: str
    shapes: dict[str, torch.Size]
    padded: bool = True

    @property
    def numel(self) -> int:
        """Number of elements, without padding."""
        return sum(map(math.prod, self.shapes.values()))


def meta_model(config: Path, adapter: Any = None) -> nn.Module:
    """Return the model that a directory's ``config.json`` describes, without values.

    Args:
        config: the directory.
        adapter: peft's config of the adapter that the model was trained with; None without one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config, local_files_only=True))
        if adapter is not None:
            from peft import get_peft_model

            model = get_peft_model(model, adapter)
    return model


def flat_units(model: Any) -> list[FlatUnit]:
    """Return the units of a model, with or without an adapter, in the order of the optimizer."""
    layers = set(model._no_split_modules or ())

    def wraps(module: nn.Module) -> bool:
        return type(module).__name__ in layers or (hasattr(model, "peft_config") and _is_trainable_leaf(module))

    return module_units(model, wraps)


def module_units(model: nn.Module, wraps: Callable[[nn.Module], bool]) -> list[FlatUnit]:
    """Return the units of a model, of which the modules that ``wraps`` chooses are one each.

    Example:
        >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False))
        >>> [(unit.name, list(unit.shapes)) for unit in module_units(model, lambda module: module is model[1])]
        [('the root', ['0.weight', '2.weight']), ('1', ['1.weight'])]
    """
    owners = [name for name, module in model.named_modules() if name and wraps(module)]
    units: dict[str, dict[str, torch.Size]] = {"": {}, **{owner: {} for owner in owners}}
    # A tied parameter is in the unit that has it first, once.
    for name, parameter in model.named_parameters():
        owner = max((owner for owner in units if not owner or name.startswith(f"{owner}.")), key=len)
        units[owner][name] = parameter.shape
    return [FlatUnit(owner or "the root", shapes) for owner, shapes in units.items() if shapes]


def _is_trainable_leaf(module: nn.Module) -> bool:
    """Return whether verl wraps a module of an adapted model: one without modules in it, whose weight is trained."""
    weight = getattr(module, "weight", None)
    return not list(module.children()) and isinstance(weight, nn.Parameter) and weight.requires_grad
