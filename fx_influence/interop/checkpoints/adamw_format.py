"""Optimizer state dicts recognised as AdamW's, or refused with the name of the optimizer that wrote them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fx_influence.interop.checkpoints.dcp.read import StoredValue
from fx_influence.interop.optimizers import SUPPORTED

_STATE_FIELDS = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}

_OPTIMIZER_BY_FIELD = {
    "__bnb_optimizer_quant_state__": "bitsandbytes (another one than AdamW)",
    "state1": "bitsandbytes (another one than AdamW)",
    "ns_steps": "Muon",
    "beta2_decay": "torch.optim.Adafactor",
    "scale_parameter": "the Adafactor of transformers",
    "exp_avg_slow": "AdEMAMix",
    "weight_lr_power": "schedule-free AdamW",
    "update_proj_gap": "GaLore",
    "shampoo_beta": "SOAP",
    "d_coef": "Prodigy",
    "momentum_decay": "torch.optim.NAdam",
    "exp_inf": "torch.optim.Adamax",
    "initial_accumulator_value": "torch.optim.Adagrad",
    "rho": "torch.optim.Adadelta",
    "lambd": "torch.optim.ASGD",
    "centered": "torch.optim.RMSprop",
    "etas": "torch.optim.Rprop",
    "dampening": "torch.optim.SGD",
    "history_size": "torch.optim.LBFGS",
}
"""Name of the optimizer, by a field that only its groups or states have."""


def require_adamw_state_dict(state_dict: Any) -> None:
    """Refuse a state dict that is not of AdamW, as far as its fields show.

    Raises:
        TypeError: for another optimizer's state dict, naming the optimizer where a field tells it.
        ValueError: for anything that is not an optimizer's state dict.
    """
    saved = nest_flattened(state_dict)
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= set(saved):
        raise ValueError(
            "the optimizer's state dict has no 'state' and 'param_groups'; expected both. Pass optimizer.state_dict()"
        )
    groups = {
        f"param_groups[{i}] of the optimizer's state dict": group for i, group in enumerate(saved["param_groups"])
    }
    entries = {f"the optimizer's state of parameter {i}": entry for i, entry in saved["state"].items()}
    for subject, fields in {**groups, **entries}.items():
        owner = next((_OPTIMIZER_BY_FIELD[field] for field in fields if field in _OPTIMIZER_BY_FIELD), None)
        if set(fields) - {"step"} == {"exp_avg"}:
            owner = "Lion"
        if owner is not None:
            raise TypeError(f"{subject} has the fields {sorted(fields)}, as of {owner}; {SUPPORTED}")
    for subject, group in groups.items():
        _require_adamw_group(subject, group)
    for subject, entry in entries.items():
        _require_adamw_entry(subject, entry)


def _require_adamw_group(subject: str, group: dict[str, Any]) -> None:
    """Raise ``TypeError`` for a parameter group with fields that are not AdamW's."""
    absent = {"lr", "betas", "eps", "weight_decay", "amsgrad"} - set(group)
    if absent or len(group["betas"]) != 2 or {"momentum", "nesterov"} & set(group):
        raise TypeError(f"{subject} has the fields {sorted(group)}; {SUPPORTED}")
    if group["weight_decay"] != 0 and not group.get("decoupled_weight_decay", True):
        raise TypeError(f"{subject} has decoupled_weight_decay=False, as torch.optim.Adam; {SUPPORTED}")


def _require_adamw_entry(subject: str, entry: dict[str, Any]) -> None:
    """Raise ``TypeError`` for a parameter's state with fields that are not AdamW's, or quantised ones."""
    if not {"step", "exp_avg", "exp_avg_sq"} <= set(entry) <= _STATE_FIELDS:
        raise TypeError(f"{subject} has the fields {sorted(entry)}; {SUPPORTED}")
    for field in sorted(_STATE_FIELDS & set(entry) - {"step"}):
        value = entry[field]
        if isinstance(value, StoredValue):
            continue
        if type(value) is not Tensor or not value.is_floating_point() or value.element_size() == 1:
            kind = f"{type(value).__name__} of {getattr(value, 'dtype', 'no dtype')}"
            raise TypeError(
                f"{subject} has a {kind} as {field}, so it seems to be 8-bit, 4-bit or one process's share; "
                f"{SUPPORTED}, and its state in full tensors of floating-point numbers"
            )


def nest_flattened(state_dict: Any) -> Any:
    """Return ``param_groups.NAME.lr`` and ``state.NAME.exp_avg`` as groups, one per name, and their states."""
    if not isinstance(state_dict, dict) or not any(str(key).startswith("param_groups.") for key in state_dict):
        return state_dict
    nested: dict[str, dict[str, dict[str, Any]]] = {"param_groups": {}, "state": {}}
    for key, value in state_dict.items():
        section, _, rest = key.partition(".")
        name, _, field = rest.rpartition(".")
        nested.setdefault(section, {}).setdefault(name, {})[field] = value
    return {**nested, "param_groups": [{**group, "params": [name]} for name, group in nested["param_groups"].items()]}
