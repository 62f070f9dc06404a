"""AdamW's state read out of a live ``torch.optim`` optimizer as values by parameter name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fx_influence.core.checks import wrong_type
from fx_influence.core.dtensor import is_sharded, to_local
from fx_influence.core.parameter_checks import check_model
from fx_influence.distributed.collectives import raise_on_all_ranks
from fx_influence.policy.model.template import unwrap_model
from fx_influence.types import AdamWHyper, AdamWState

Value = TypeVar("Value")

SUPPORTED = "supported are torch.optim.AdamW, its subclasses, and torch.optim.Adam with decoupled_weight_decay=True"

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def adamw_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> AdamWState:
    """The optimizer's moments, step counts and hyperparameters by the names of ``model.named_parameters()``.

    Hyperparameters come from the ``param_groups``, never from the optimizer's defaults: a scheduler or a caller
    changes the groups only. rho = lr_group / lr_ref with lr_ref the first nonzero lr in group order; where every lr
    is 0, as on the first step of a warm-up, rho is the ratio of the groups' ``initial_lr``, or 1 if they have none.

    ``optimizer``: a ``torch.optim.AdamW`` or an ``Adam`` with decoupled weight decay, bare or inside a wrapper that
    keeps it as ``.optimizer`` (accelerate). It is read only: no state is created in it.
    ``model``: the module whose parameters the optimizer holds, or what wraps it (``torch.compile``, data parallelism);
    names are those of the module inside. Tied parameters appear once.
    Of a model that FSDP2 has sharded they are DTensors, sharded as the parameters, and every rank makes the call.
    Returns clones in the parameter's shape, in the widest of the state's dtype, the parameter's and float32; zeros
    and step 0 for a parameter that has made no step. Trainable parameters that the optimizer does not hold and
    frozen ones that it does are left out.

    Raises ``TypeError`` for any other optimizer. Raises ``ValueError`` for a parameter that is not the model's, a
    shape that differs from the parameter's, and values that are missing, not finite or out of range.
    Source: Loshchilov and Hutter, arXiv 1711.05101; ``torch.optim.AdamW``.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> optimizer.param_groups[0]["lr"] = 0.2
        >>> state = adamw_state(optimizer, model)
        >>> state.lr, state.step, state.exp_avg["bias"].tolist()
        (0.2, {'weight': 0, 'bias': 0}, [0.0])
    """
    if isinstance(model, torch.optim.Optimizer):
        raise wrong_type("model", model, "a torch.nn.Module", "Swap the two: fx.adamw_state(optimizer, model)")
    check_model(model)
    if isinstance(optimizer, dict):
        remedy = "Load it first: optimizer.load_state_dict(...), or fx.restore_optimizer"
        raise wrong_type("optimizer", optimizer, "a torch optimizer", remedy)
    model = unwrap_model(model)
    return on_all_ranks(model, lambda: _state(require_adamw(optimizer), model))


def on_all_ranks(model: nn.Module, call: Callable[[], Value]) -> Value:
    """What ``call`` gives; of a sharded model, on all ranks ``raise_on_all_ranks``."""
    mesh: Any = next((cast(Any, p).device_mesh for p in model.parameters() if is_sharded(p)), None)
    return call() if mesh is None else raise_on_all_ranks(mesh, call)


def _state(adamw: torch.optim.Optimizer, model: nn.Module) -> AdamWState:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    lr, scales = _learning_rates(adamw.param_groups)
    moments: dict[str, dict[str, Tensor]] = {key: {} for key in _MOMENTS}
    steps: dict[str, int] = {}
    hyper: dict[str, AdamWHyper] = {}
    for index, (group, scale) in enumerate(zip(adamw.param_groups, scales, strict=True)):
        shared = _hyper(group, scale)
        for name, parameter in _named(group["params"], names, index):
            # .get, because the state is a defaultdict and indexing it would create an entry
            state = adamw.state.get(parameter, {})
            steps[name], hyper[name] = _step(name, state), shared
            for key in _MOMENTS[: 3 if shared.amsgrad else 2]:
                moments[key][name] = _moment(name, key, parameter, state)
    if not steps:
        raise ValueError(
            "optimizer holds no trainable parameter of model; set requires_grad on what was trained "
            "(PEFT: load the adapter with is_trainable=True)"
        )
    return AdamWState(moments["exp_avg"], moments["exp_avg_sq"], moments["max_exp_avg_sq"], steps, hyper, lr)


def _unwrap(optimizer: Any) -> Any:
    while not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and isinstance(
        getattr(optimizer, "optimizer", None), torch.optim.Optimizer
    ):
        optimizer = optimizer.optimizer
    return optimizer


def require_adamw(optimizer: Any) -> Any:
    """The AdamW inside any wrappers. Raises ``TypeError`` for another optimizer."""
    optimizer = _unwrap(optimizer)
    # AdamW is a subclass of Adam in recent torch only, and Adam's flag is newer than torch 2.1
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    is_adamw = isinstance(optimizer, torch.optim.AdamW)
    if not is_adamw and not isinstance(optimizer, torch.optim.Adam):
        raise TypeError(f"optimizer is {kind}, whose step is not AdamW's; {SUPPORTED}")
    for index, group in enumerate(optimizer.param_groups):
        if not group.get("decoupled_weight_decay", is_adamw):
            raise TypeError(
                f"optimizer is {kind} with decoupled_weight_decay=False in param_groups[{index}], so its weight decay "
                f"is part of the gradient; {SUPPORTED}"
            )
    return optimizer


def _learning_rates(groups: list[dict[str, Any]]) -> tuple[float, list[float]]:
    """lr_ref and each group's rho."""
    rates = [_number(f"param_groups[{i}]['lr']", group["lr"]) for i, group in enumerate(groups)]
    reference = next((rate for rate in rates if rate != 0.0), 0.0)
    if reference:
        return reference, [rate / reference for rate in rates]
    if all("initial_lr" in group for group in groups):
        rates = [_number(f"param_groups[{i}]['initial_lr']", group["initial_lr"]) for i, group in enumerate(groups)]
        initial = next((rate for rate in rates if rate != 0.0), 0.0)
        if initial:
            return 0.0, [rate / initial for rate in rates]
    return 0.0, [1.0] * len(groups)


def _hyper(group: dict[str, Any], lr_scale: float) -> AdamWHyper:
    beta1, beta2 = (_number("betas", beta) for beta in group["betas"])
    return AdamWHyper(
        lr_scale=lr_scale,
        beta1=beta1,
        beta2=beta2,
        eps=_number("eps", group["eps"]),
        weight_decay=_number("weight_decay", group["weight_decay"]),
        amsgrad=bool(group.get("amsgrad", False)),
        maximize=bool(group.get("maximize", False)),
    )


def _named(parameters: list[Tensor], names: dict[Tensor, str], group: int) -> list[tuple[str, Tensor]]:
    named = []
    for index, parameter in enumerate(parameters):
        if parameter not in names:
            raise ValueError(
                f"param_groups[{group}]['params'][{index}] of shape {tuple(parameter.shape)} is not in "
                "model.named_parameters(): optimizer state of another model; pass the very module whose parameters "
                "the optimizer was built with"
            )
        if parameter.requires_grad:
            named.append((names[parameter], parameter))
    return named


def _moment(name: str, key: str, parameter: Tensor, state: dict[str, Any]) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if not state:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    value: Tensor | None = state.get(key)
    if value is None:
        raise ValueError(f"optimizer state of {name} has no {key!r} (it has {sorted(state)}); {SUPPORTED}")
    if value.shape != parameter.shape:
        raise ValueError(
            f"optimizer state {key} of {name} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}: "
            "optimizer state of another model; pass the state saved with these weights"
        )
    if is_sharded(value) != is_sharded(parameter):
        raise ValueError(
            f"optimizer state {key} of {name} and the parameter are not both DTensors; make the optimizer after "
            "fully_shard, or load its state with restore_optimizer"
        )
    value = value.detach().to(device=parameter.device, dtype=torch.promote_types(value.dtype, dtype), copy=True)
    own = to_local(value)
    bad = ~torch.isfinite(own) if key == "exp_avg" else ~torch.isfinite(own) | (own < 0)
    if bad.any():
        raise ValueError(
            f"optimizer state {key} of {name} holds {own[bad][0].item()} ({int(bad.sum())} such values), which AdamW "
            "cannot have; take an earlier checkpoint, from before the training diverged"
        )
    return value


def _step(name: str, state: dict[str, Any]) -> int:
    if not state:
        return 0
    step = _number(f"optimizer state step of {name}", state.get("step", math.nan))
    if step < 0 or step != int(step):
        raise ValueError(f"optimizer state step of {name} is {step}; it counts updates, so pass a whole number >= 0")
    return int(step)


def _number(field: str, value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{field} is {number}; it must be a finite number: set it in the optimizer")
    return number
