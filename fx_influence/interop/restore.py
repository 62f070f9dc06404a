"""Saved optimizer states put back over a model: which parameter stands behind each integer id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fx_influence.interop.optim import SUPPORTED

# what transformers' Trainer.get_decay_parameter_names excludes from weight decay, besides the LayerNorm modules
NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def restore_optimizer(
    state_dict: dict[str, Any], model: nn.Module, param_names: Sequence[Sequence[str]] | None = None
) -> torch.optim.AdamW:
    """A real ``torch.optim.AdamW`` over ``model``'s parameters, holding a saved state whose ids are integers.

    The names behind the ids are, group by group and in this order of preference,

    - ``param_names``, or those that torch stored in the groups (an optimizer built from ``named_parameters()``);
    - with two groups, the rule of transformers' ``Trainer``: the trainable parameters with weight decay in model
      order, then those without (biases and norms, whose weight decay is 0), either group possibly empty;
    - with one group, ``model.named_parameters()`` order, of the trainable parameters or else of all.

    ``state_dict``: from ``optimizer.state_dict()``. Its learning rates are those of the *next* step, and 0 at the
    end of most schedules: ``adamw_state`` says what that means.
    The rules cannot see a same-shape permutation: give ``param_names`` for an optimizer grouped in another way.

    Raises ``TypeError`` for the state of another optimizer than AdamW, as far as its state dict shows; ``ValueError``
    where the groups do not match the rule, or counts or shapes the model, with both.
    Source: ``transformers.Trainer.create_optimizer`` and ``get_decay_parameter_names`` (transformers 5.23).

    Example:
        >>> model = nn.Linear(2, 1)
        >>> saved = torch.optim.AdamW(model.parameters(), lr=0.5).state_dict()
        >>> restore_optimizer(saved, model).param_groups[0]["lr"]
        0.5
    """
    require_adamw_state_dict(state_dict)
    groups = state_dict["param_groups"]
    parameters = dict(model.named_parameters())
    names, rule = _group_names(groups, model, param_names)
    _check_groups(state_dict, names, parameters, rule)
    optimizer = torch.optim.AdamW([{"params": [parameters[name] for name in group]} for group in names])
    optimizer.load_state_dict(state_dict)
    return optimizer


def require_adamw_state_dict(state_dict: Any) -> None:
    """``TypeError`` for another optimizer's state dict, as far as its fields show; ``ValueError`` if it is none."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError("the optimizer's state dict has no 'state' and 'param_groups'; pass optimizer.state_dict()")
    for index, group in enumerate(state_dict["param_groups"]):
        absent = {"lr", "betas", "eps", "weight_decay", "amsgrad"} - set(group)
        foreign = {"momentum", "momentum_decay", "nesterov"} & set(group)
        if absent or foreign or len(group["betas"]) != 2:
            raise TypeError(
                f"param_groups[{index}] of the optimizer's state dict has the fields {sorted(group)}, not AdamW's; "
                f"{SUPPORTED}"
            )
        if not group.get("decoupled_weight_decay", True):
            raise TypeError(f"param_groups[{index}] has decoupled_weight_decay=False; {SUPPORTED}")
    for index, entry in state_dict["state"].items():
        if not {"step", "exp_avg", "exp_avg_sq"} <= set(entry):
            raise TypeError(f"the optimizer's state of parameter {index} has {sorted(entry)}, not AdamW's; {SUPPORTED}")


def _group_names(
    groups: list[dict[str, Any]], model: nn.Module, param_names: Sequence[Sequence[str]] | None
) -> tuple[list[list[str]], str]:
    """The names group by group, and the rule they come from."""
    if param_names is not None:
        return [list(group) for group in param_names], "param_names"
    if all("param_names" in group for group in groups):
        return [list(group["param_names"]) for group in groups], "the names stored in param_groups"
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if len(groups) == 1:
        every = [name for name, _ in model.named_parameters()]
        return [every if len(groups[0]["params"]) == len(every) else trainable], "named_parameters() order"
    if len(groups) == 2 and float(groups[1]["weight_decay"]) == 0.0:
        from transformers.trainer_pt_utils import get_parameter_names

        decay = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY))
        split = [[n for n in trainable if n in decay], [n for n in trainable if n not in decay]]
        return split, "the decay and no-decay groups of transformers' Trainer"
    raise ValueError(
        f"the optimizer's state dict has {len(groups)} groups with weight_decay "
        f"{[group['weight_decay'] for group in groups]}, which no rule maps to names; pass param_names=, the names "
        "group by group"
    )


def _check_groups(
    state_dict: dict[str, Any], names: list[list[str]], parameters: dict[str, nn.Parameter], rule: str
) -> None:
    groups = [group["params"] for group in state_dict["param_groups"]]
    saved, expected = [len(group) for group in groups], [len(group) for group in names]
    remedy = "load the model that it was saved with, or pass param_names=, the names group by group"
    if saved != expected:
        raise ValueError(f"the optimizer's groups hold {saved} parameters, {rule} gives {expected}; {remedy}")
    flat = [name for group in names for name in group]
    unknown = [name for name in flat if name not in parameters]
    if unknown or len(set(flat)) < len(flat):
        raise ValueError(f"{rule} has names that are twice there or not in the model: {unknown[:5]}; {remedy}")
    for index, name in zip((index for group in groups for index in group), flat, strict=True):
        shape = tuple(state_dict["state"].get(index, {}).get("exp_avg", parameters[name]).shape)
        if shape != tuple(parameters[name].shape):
            raise ValueError(
                f"by {rule}, the optimizer's parameter {index} is {name}, but its exp_avg has shape {shape} and the "
                f"parameter {tuple(parameters[name].shape)}; {remedy}"
            )
