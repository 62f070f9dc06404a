"""Contents of the flat parameters of FSDP1, which follow from the model's architecture.

FSDP1 without ``use_orig_params`` puts the parameters of each unit, in the order of its modules, into one vector, padded
so that ranks have equal shares. verl wraps the classes that the model names in ``_no_split_modules``, and then the
root, whose vector is the first parameter. Source: torch 2.13, ``torch.distributed.fsdp._flat_param``;
verl-project/verl, verl/utils/fsdp_utils.py at commit 1dda039 (``get_fsdp_wrap_policy``).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn


class FlatUnit(NamedTuple):
    """A unit of FSDP: its name, and the shapes of its parameters in the order of its vector."""

    name: str
    shapes: dict[str, torch.Size]

    @property
    def numel(self) -> int:
        """Number of elements, without padding."""
        return sum(map(math.prod, self.shapes.values()))


def flat_units(config: Path) -> list[FlatUnit]:
    """Return the units of the model that a directory's ``config.json`` describes, in the order of the optimizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config, local_files_only=True))
    return module_units(model, set(model._no_split_modules or ()))


def module_units(model: nn.Module, wrapped: set[str]) -> list[FlatUnit]:
    """Return the units of a model, of which modules of the classes in ``wrapped`` are one each.

    Example:
        >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False))
        >>> [(unit.name, list(unit.shapes)) for unit in module_units(model, {"Linear"})]
        [('the root', ['0.weight']), ('1', ['1.weight']), ('2', ['2.weight'])]
    """
    owners = [name for name, module in model.named_modules() if type(module).__name__ in wrapped]
    units: dict[str, dict[str, torch.Size]] = {"": {}, **{owner: {} for owner in owners}}
    # A tied parameter is in the unit that has it first, once.
    for name, parameter in model.named_parameters():
        owner = max((owner for owner in units if not owner or name.startswith(f"{owner}.")), key=len)
        units[owner][name] = parameter.shape
    return [FlatUnit(owner or "the root", shapes) for owner, shapes in units.items() if shapes]
