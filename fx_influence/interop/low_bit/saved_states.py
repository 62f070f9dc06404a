"""Saved states of the AdamW of bitsandbytes and torchao as state dicts of ``torch.optim.AdamW``."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from fx_influence.interop.low_bit.moments import stored_moment
from fx_influence.interop.low_bit.torchao_optimizers import is_quantised

NESTED = "__bnb_optimizer_quant_state__"
"""Field under which ``state_dict()`` hides the quantised tensors of a parameter from FSDP, since version 0.49."""

_ADAMW_FIELDS = {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}


def with_full_moments(state_dict: Any) -> Any:
    """Return a state dict of an Adam or AdamW of bitsandbytes or torchao with its moments in float32, by AdamW's names.

    Any other state dict is returned as it is: that of another optimizer of bitsandbytes too, which has other fields
    than these (one moment, three betas, the norm of an update). Options that change the step and leave no trace in a
    state dict, such as overrides of single parameters, are not seen. Neither is whether a weight decay of torchao's is
    AdamW's or part of the gradient, as of its ``Adam8bit``: a ``UserWarning`` says that it is taken for AdamW's.

    Args:
        state_dict: from ``optimizer.state_dict()``.

    Raises:
        ValueError: for scales that do not belong to blocks.

    Example:
        >>> import torch
        >>> entry = {"step": 3, "state1": torch.ones(2), "state2": torch.zeros(2)}
        >>> group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
        >>> list(with_full_moments({"state": {0: entry}, "param_groups": [group]})["state"][0])
        ['step', 'exp_avg', 'exp_avg_sq']
    """
    if not isinstance(state_dict, dict) or not isinstance(state_dict.get("state"), dict):
        return state_dict
    entries = {key: _flat(entry) for key, entry in state_dict["state"].items()}
    groups = state_dict.get("param_groups", ())
    if any(map(_is_of_torchao, entries.values())):
        return _from_torchao(state_dict)
    pairs = all(isinstance(g.get("betas"), (tuple, list)) and len(g["betas"]) == 2 for g in groups)
    if not entries or not pairs or not all(map(_is_adamws, entries.values())):
        return state_dict
    return {
        **state_dict,
        "state": {key: _full(entry) for key, entry in entries.items()},
        "param_groups": [{"amsgrad": False, **group} for group in groups],
    }


def _flat(entry: Any) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(NESTED), dict):
        return entry
    return {**{key: value for key, value in entry.items() if key != NESTED}, **entry[NESTED]}


def _is_adamws(entry: Any) -> bool:
    return isinstance(entry, dict) and {"step", "state1", "state2"} <= set(entry) <= _ADAMW_FIELDS


def _full(entry: dict[str, Any]) -> dict[str, Any]:
    return {"step": entry["step"], **_read_moments(entry)}


def _is_of_torchao(entry: Any) -> bool:
    return isinstance(entry, dict) and any(isinstance(x, Tensor) and is_quantised(x) for x in entry.values())


def _from_torchao(state_dict: dict[str, Any]) -> dict[str, Any]:
    if any(float(group.get("weight_decay", 0)) for group in state_dict["param_groups"]):
        warnings.warn(
            "the state dict of torchao's optimizer has a weight decay, which is taken for AdamW's; if the optimizer "
            "was an Adam of torchao, its steps are others",
            stacklevel=2,
        )
    states = {key: {**entry, **_read_moments(entry)} for key, entry in state_dict["state"].items()}
    return {**state_dict, "state": states}


def _read_moments(entry: dict[str, Any]) -> dict[str, Tensor]:
    moments = {key: stored_moment(entry, key) for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    return {key: moment.read() for key, moment in moments.items() if moment is not None}
