"""Saved AdamW states restored over a model: which parameter stands behind each integer id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fx_influence.core.dtensor import is_sharded, to_local
from fx_influence.interop.checkpoints.adamw_format import nest_flattened, require_adamw_state_dict
from fx_influence.interop.checkpoints.dcp.read import StoredValue, read_slice
from fx_influence.interop.low_bit.saved_states import with_full_moments

# Names that transformers' Trainer.get_decay_parameter_names excludes from weight decay, besides LayerNorm modules.
NO_DECAY_PATTERNS = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]

OLD_NO_DECAY_PATTERNS = [r"bias"]
"""The same before pull request 35927 of transformers (2025)."""


def restore_optimizer(
    state_dict: dict[str, Any], model: nn.Module, param_names: Sequence[Sequence[str]] | None = None
) -> torch.optim.AdamW:
    """Return a real ``torch.optim.AdamW`` over ``model``'s parameters, with a saved state.

    The names behind integer ids are, group by group and in this order of preference,

    - ``param_names``, or those that torch stored in the groups (an optimizer built from ``named_parameters()``);
    - with two groups, the rule of transformers' ``Trainer``: the trainable parameters with weight decay in model
      order, then those without (biases and norms, whose weight decay is 0), either group possibly empty; where the
      counts fit only the rule of transformers before its pull request 35927 (2025), that one, by which norms other
      than ``LayerNorm`` decay;
    - with one group, ``model.named_parameters()`` order, of the trainable parameters or else of all.

    The rules cannot see a permutation of parameters of the same shape: give ``param_names`` for an optimizer grouped in
    another way.

    Args:
        state_dict: from ``optimizer.state_dict()``, whose ids are integers, or by parameter names, which need no rule:
            from torch's ``get_optimizer_state_dict``, flattened or not, or ``FSDP.optim_state_dict``, in full tensors;
            also of bitsandbytes' Adam or AdamW, whose quantised moments are dequantised.
            Its learning rates are those of the *next* step, and 0 at the end of most schedules: see ``adamw_state``.
        model: the model that was trained; if FSDP2 has sharded it, each rank's optimizer takes its shards of the state.
        param_names: the parameters' names, group by group; None to follow the rules.

    Raises:
        TypeError: for the state of another optimizer than AdamW, as far as its state dict shows (older torch writes the
            same fields for ``Adam``, whose weight decay, unless it is 0, is part of the gradient).
        ValueError: if the groups do not match the rule, or counts or shapes the model, with both.

    Example:
        >>> from fx_influence.interop.optimizers import adamw_state
        >>> model = nn.Linear(2, 1)
        >>> saved = torch.optim.AdamW(model.parameters(), lr=0.5).state_dict()
        >>> adamw_state(restore_optimizer(saved, model), model).lr
        0.5

    Source: ``transformers.Trainer.create_optimizer`` and ``get_decay_parameter_names`` (transformers 5.23).
    """
    state_dict = with_full_moments(state_dict)
    require_adamw_state_dict(state_dict)
    state_dict, stored_names = _by_id(state_dict)
    parameters = dict(model.named_parameters())
    names, rule = _group_names(state_dict["param_groups"], model, stored_names, param_names)
    _check_groups(state_dict, names, parameters, rule)
    by_id = {index: parameters[name] for index, name in _ids_and_names(state_dict, names)}
    for index, entry in state_dict["state"].items():
        state_dict["state"][index] = {field: _local_shard(value, by_id[index]) for field, value in entry.items()}
    optimizer = torch.optim.AdamW([{"params": [parameters[name] for name in group]} for group in names])
    optimizer.load_state_dict(state_dict)
    return optimizer


def _ids_and_names(state_dict: dict[str, Any], names: list[list[str]]) -> Iterator[tuple[int, str]]:
    """Yield the integer id and the name of each parameter."""
    for group, group_names in zip(state_dict["param_groups"], names, strict=True):
        yield from zip(group["params"], group_names, strict=True)


def _local_shard(value: Any, parameter: nn.Parameter) -> Any:
    """Slice an optimizer moment to the local shard of the parameter; return other values unchanged."""
    if not is_sharded(parameter) or not isinstance(value, (StoredValue, Tensor)) or value.shape == ():
        return value
    from fx_influence.distributed.fsdp_gather import local_slices, shard_like

    slices = local_slices(parameter)
    if isinstance(value, StoredValue):
        local = torch.empty_like(to_local(parameter.detach()))
        read_slice(value, [index.start for index in slices], local)
    else:
        local = value[tuple(slices)].to(parameter.device, copy=True)
    return shard_like(local, parameter)


def _by_id(state_dict: dict[str, Any]) -> tuple[dict[str, Any], list[list[str]] | None]:
    """Return the state dict with integer ids, and the names that it had in their place, group by group."""
    saved = nest_flattened(state_dict)
    groups = saved["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    # torch.distributed.checkpoint saves ids as strings.
    ids = {str(key): index for index, key in enumerate(keys)}
    if foreign := sorted(str(key) for key in saved["state"] if str(key) not in ids):
        raise ValueError(
            f"the optimizer's state holds {foreign[:5]}, which are in no group; expected parameters of its groups. "
            "Pass the complete state dict"
        )
    numbered = [{**group, "params": [ids[str(key)] for key in group["params"]]} for group in groups]
    state = {ids[str(key)]: entry for key, entry in saved["state"].items()}
    by_name = any(isinstance(key, str) for key in keys)
    return {"param_groups": numbered, "state": state}, [g["params"] for g in groups] if by_name else None


def _group_names(
    groups: list[dict[str, Any]],
    model: nn.Module,
    stored_names: list[list[str]] | None,
    param_names: Sequence[Sequence[str]] | None,
) -> tuple[list[list[str]], str]:
    """Return the names group by group, and the rule that they follow from."""
    if stored_names is not None:
        if param_names is not None and stored_names != [list(group) for group in param_names]:
            raise ValueError(
                "param_names differ from the names in the optimizer's state dict; expected the same. Leave them out"
            )
        return stored_names, "the names in place of ids"
    if param_names is not None:
        return [list(group) for group in param_names], "param_names"
    if all("param_names" in group for group in groups):
        return [list(group["param_names"]) for group in groups], "the names stored in param_groups"
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if len(groups) == 1:
        all_names = [name for name, _ in model.named_parameters()]
        return [all_names if len(groups[0]["params"]) == len(all_names) else trainable], "named_parameters() order"
    if len(groups) == 2 and float(groups[1]["weight_decay"]) == 0.0:
        from transformers.trainer_pt_utils import get_parameter_names

        saved = [len(group["params"]) for group in groups]
        splits = []
        for patterns in (NO_DECAY_PATTERNS, OLD_NO_DECAY_PATTERNS):
            decay = set(get_parameter_names(model, [nn.LayerNorm], patterns))
            splits.append([[n for n in trainable if n in decay], [n for n in trainable if n not in decay]])
        # What decays by today's rule also does by the older one, so equal counts mean equal groups.
        split = next((split for split in splits if [*map(len, split)] == saved), splits[0])
        return split, "the decay and no-decay groups of transformers' Trainer"
    raise ValueError(
        f"the optimizer's state dict has {len(groups)} groups with weight_decay "
        f"{[group['weight_decay'] for group in groups]}; expected a grouping that has a known order of names. Pass "
        "param_names=, the names group by group"
    )


def _check_groups(
    state_dict: dict[str, Any], names: list[list[str]], parameters: dict[str, nn.Parameter], rule: str
) -> None:
    """Raise ``ValueError`` if the names do not fit the saved groups or the model."""
    groups = [group["params"] for group in state_dict["param_groups"]]
    saved, expected = [len(group) for group in groups], [len(group) for group in names]
    remedy = "Load the model that it was saved with, or pass param_names=, the names group by group"
    if saved != expected:
        raise ValueError(f"the optimizer's groups hold {saved} parameters; expected {expected}, by {rule}. {remedy}")
    flat = [name for group in names for name in group]
    counts = Counter(flat)
    wrong = [name for name in counts if name not in parameters or counts[name] > 1]
    if wrong:
        raise ValueError(
            f"{rule} has {wrong[:5]} twice, or the model lacks them; expected each name of the model at most once. "
            f"{remedy}"
        )
    for index, name in _ids_and_names(state_dict, names):
        shape = tuple(state_dict["state"].get(index, {}).get("exp_avg", parameters[name]).shape)
        if shape != tuple(parameters[name].shape):
            raise ValueError(
                f"exp_avg of the optimizer's parameter {index} has shape {shape}; expected "
                f"{tuple(parameters[name].shape)}, that of {name} by {rule}. {remedy}"
            )
