"""Optimizer state dicts recognised as AdamW's, or refused with the name of the optimizer that they are of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fx_influence.interop.checkpoints.dcp.read import StoredValue
from fx_influence.interop.optimizers import SUPPORTED

_STATE = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


_FOREIGN = {
    "__bnb_optimizer_quant_state__": "bitsandbytes (8-bit, paged and AdEMAMix ones among them)",
    "state1": "bitsandbytes (8-bit, paged and AdEMAMix ones among them)",
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
"""What an optimizer's state dict is of, by a field that only this optimizer's groups or states have."""


def require_adamw_state_dict(state_dict: Any) -> None:
    """``TypeError`` for another optimizer's state dict, as far as its fields show; ``ValueError`` if it is none."""
    saved = nest_flattened(state_dict)
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= set(saved):
        raise ValueError("the optimizer's state dict has no 'state' and 'param_groups'; pass optimizer.state_dict()")
    owners = {
        f"param_groups[{i}] of the optimizer's state dict": group for i, group in enumerate(saved["param_groups"])
    }
    entries = {f"the optimizer's state of parameter {i}": entry for i, entry in saved["state"].items()}
    for what, fields in {**owners, **entries}.items():
        of = next((_FOREIGN[field] for field in fields if field in _FOREIGN), None)
        if set(fields) - {"step"} == {"exp_avg"}:
            of = "Lion"
        if of is not None:
            raise TypeError(f"{what} has the fields {sorted(fields)}, so it seems to be of {of}; {SUPPORTED}")
    for what, group in owners.items():
        _require_adamw_group(what, group)
    for what, entry in entries.items():
        _require_adamw_entry(what, entry)


def _require_adamw_group(what: str, group: dict[str, Any]) -> None:
    absent = {"lr", "betas", "eps", "weight_decay", "amsgrad"} - set(group)
    if absent or len(group["betas"]) != 2 or {"momentum", "nesterov"} & set(group):
        raise TypeError(f"{what} has the fields {sorted(group)}, not AdamW's; {SUPPORTED}")
    if not group.get("decoupled_weight_decay", True):
        raise TypeError(f"{what} has decoupled_weight_decay=False, as torch.optim.Adam; {SUPPORTED}")


def _require_adamw_entry(what: str, entry: dict[str, Any]) -> None:
    if not {"step", "exp_avg", "exp_avg_sq"} <= set(entry) <= _STATE:
        raise TypeError(f"{what} has the fields {sorted(entry)}, not AdamW's; {SUPPORTED}")
    for field in sorted(_STATE & set(entry) - {"step"}):
        value = entry[field]
        if isinstance(value, StoredValue):
            continue
        if type(value) is not Tensor or not value.is_floating_point() or value.element_size() == 1:
            kind = f"{type(value).__name__} of {getattr(value, 'dtype', 'no dtype')}"
            raise TypeError(
                f"{what} has a {kind} as {field}, so it seems to be 8-bit, 4-bit or one process's share; {SUPPORTED}, "
                "its state in whole tensors of floating-point numbers"
            )


def nest_flattened(state_dict: Any) -> Any:
    """``param_groups.NAME.lr`` and ``state.NAME.exp_avg`` as the groups, one a name, and states that they are of."""
    if not isinstance(state_dict, dict) or not any(str(key).startswith("param_groups.") for key in state_dict):
        return state_dict
    found: dict[str, dict[str, dict[str, Any]]] = {"param_groups": {}, "state": {}}
    for key, value in state_dict.items():
        part, _, rest = key.partition(".")
        name, _, field = rest.rpartition(".")
        found.setdefault(part, {}).setdefault(name, {})[field] = value
    return {**found, "param_groups": [{**group, "params": [name]} for name, group in found["param_groups"].items()]}
