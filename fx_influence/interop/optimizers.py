"""The state of a live AdamW optimizer, read as values by parameter name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fx_influence.core.checks import wrong_type
from fx_influence.core.computed import ComputedTensors, Partition, PartitionedTensors
from fx_influence.core.dtensor import is_sharded
from fx_influence.core.parameter_checks import check_model
from fx_influence.distributed.collectives import raise_on_all_ranks
from fx_influence.distributed.zero.flat_partition import FlatPartition
from fx_influence.distributed.zero.flat_shards import sharded_parameters
from fx_influence.interop.low_bit.moments import (
    StoredMoment,
    check_values,
    groups_of,
    is_low_bit,
    stored_moment,
    why_not_adamw,
)
from fx_influence.interop.zero.partitions import (
    any_on_processes,
    flat_partition,
    forward_weights,
    is_zero_optimizer,
    master_weights,
    zero_optimizer,
)
from fx_influence.interop.zero.settings import check_partitions, why_refused
from fx_influence.interop.zero.stage3 import flat_adamw, flat_masters, is_stage3
from fx_influence.optim.adamw import MOMENTS
from fx_influence.policy.model.template import unwrap_model
from fx_influence.types import AdamWHyper, AdamWState, Params

Value = TypeVar("Value")

SUPPORTED = (
    "expected torch.optim.AdamW, a subclass of it, torch.optim.Adam with decoupled_weight_decay=True or "
    "weight_decay=0, or AdamW of bitsandbytes or torchao"
)


def adamw_state(optimizer: torch.optim.Optimizer, model: nn.Module, *, copy: bool = True) -> AdamWState:
    """Return the optimizer's moments, step counts and hyperparameters by the names of ``model.named_parameters()``.

    Hyperparameters come from the ``param_groups``, never from the optimizer's defaults: a scheduler or a caller
    changes the groups only. rho = lr_group / lr_ref with lr_ref the first nonzero lr in group order; where every lr
    is 0, as on the first step of a warm-up, rho is the ratio of the groups' ``initial_lr``, or 1 if they have none.

    The optimizer is only read: no state is created in it. If FSDP2 has sharded the model, the moments are DTensors,
    sharded like the parameters, and every rank makes the call. If DeepSpeed's ZeRO-1 or 2 has partitioned the
    optimizer, they are those of complete parameters on every rank, gathered by one collective for each flat vector; so
    are the float32 ``master_weights``, of which parameters in bfloat16 are the roundings. Under ZeRO-3 both are flat
    DTensors, as the parameters of ``make_functional``.

    Moments in 8 bits or fewer are dequantised, as the optimizer's step does before it updates them: the step is AdamW's
    from these values. That it then rounds the updated ones changes the steps after it, not this one.

    Args:
        optimizer: a ``torch.optim.AdamW``, an ``Adam`` with decoupled or no weight decay, an 8-bit, paged or 32-bit
            AdamW of bitsandbytes, or an AdamW8bit, AdamW4bit or AdamWFp8 of torchao; bare or inside a wrapper that
            keeps it as ``.optimizer`` (accelerate, DeepSpeed's ZeRO).
        model: the module whose parameters the optimizer holds, or a wrapper of it (``torch.compile``, data
            parallelism); names are those of the inner module. Tied parameters appear once.
        copy: True clones the moments. False returns the optimizer's live tensors, which takes no memory, wherever they
            already have the result's dtype and the parameter's device. They are valid until the optimizer's next step,
            which changes them in place, and must not be written to. Quantised moments are then dequantised at each
            access, and partitioned ones gathered, one parameter at a time: every rank makes the same accesses, or the
            same calls of ``influence``, which reads each rank's own part alone.

    Returns:
        Moments in the parameter's shape, in the widest of the state's dtype, the parameter's and float32; zeros and
        step 0 for a parameter that has made no step. Trainable parameters that the optimizer does not hold and frozen
        ones that it does hold are left out.

    Raises:
        TypeError: for any other optimizer, and for options under which the step is not AdamW's.
        ValueError: for a parameter that is not the model's, a shape that differs from the parameter's, and values that
            are missing, not finite or out of range.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> optimizer.param_groups[0]["lr"] = 0.2
        >>> state = adamw_state(optimizer, model)
        >>> state.lr, state.step, state.exp_avg["bias"].tolist()
        (0.2, {'weight': 0, 'bias': 0}, [0.0])

    Source:
        Loshchilov and Hutter, arXiv 1711.05101; ``torch.optim.AdamW``.
    """
    if isinstance(model, torch.optim.Optimizer):
        raise wrong_type("model", model, "a torch.nn.Module", "Swap the two: fx.adamw_state(optimizer, model)")
    check_model(model)
    if isinstance(optimizer, dict):
        remedy = "Load it first: optimizer.load_state_dict(...), or fx.restore_optimizer"
        raise wrong_type("optimizer", optimizer, "a torch optimizer", remedy)
    model = unwrap_model(model)
    parameters = sharded_parameters(model)

    def read() -> AdamWState:
        adamw, zero = require_adamw(optimizer), zero_optimizer(optimizer)
        if zero is not None:
            check_partitions(zero)
        if not is_stage3(zero):
            return _read_state(adamw, zero, parameters, copy)
        state = _read_state(flat_adamw(zero, model, parameters), None, parameters, copy)
        masters = flat_masters(zero, model, parameters)
        if copy and masters is not None:
            masters = {name: x.clone() for name, x in masters.items()}
        return state._replace(master_weights=masters)

    return on_all_ranks(parameters.values(), read)


def on_all_ranks(parameters: Iterable[Tensor], call: Callable[[], Value]) -> Value:
    """Call ``call`` and return its value; if parameters are sharded, what it raises on one rank is raised on all."""
    mesh: Any = next((cast(Any, p).device_mesh for p in parameters if is_sharded(p)), None)
    return call() if mesh is None else raise_on_all_ranks(mesh, call)


def _read_state(adamw: Any, zero: Any, parameters: Mapping[str, Tensor], copy: bool) -> AdamWState:
    """Return ``adamw_state``.

    Args:
        adamw: without wrappers.
        zero: DeepSpeed's optimizer around it, whose partitions of groups are its parameters; None without one.
        parameters: of the model, by name.
        copy: see ``adamw_state``.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    partition = None if zero is None else flat_partition(zero, names)
    groups = groups_of(adamw)
    lr, scales = _reference_lr_and_scales(groups)
    moments: dict[str, dict[str, Callable[[], Tensor]]] = {key: {} for key in MOMENTS}
    computed: set[str] = set()
    steps: dict[str, int] = {}
    hyper: dict[str, AdamWHyper] = {}
    stored: list[tuple[str, str, StoredMoment]] = []
    for index, (group, scale) in enumerate(zip(groups, scales, strict=True)):
        group_hyper = _read_hyper(group, scale)
        members = group["params"] if zero is None else forward_weights(zero)[index]
        for name, parameter in _trainable_by_name(members, names, index):
            # The state is a defaultdict: indexing it would create an entry.
            state = adamw.state.get(parameter if partition is None else group["params"][0], {})
            steps[name], hyper[name] = _read_step(name, state), group_hyper
            located = parameter if partition is None else partition.shard(name, parameter)
            for key in MOMENTS[: 3 if group_hyper.amsgrad else 2]:
                moment = _checked_moment(name, key, located, state, partition)
                stored.extend([(name, key, moment)] if state else [])
                if moment.is_computed and not copy:
                    computed.add(key)
                    moments[key][name] = functools.partial(_converted, moment, located, copy)
                else:
                    moments[key][name] = functools.partial(_same, _converted(moment, located, copy))
    if not steps:
        raise ValueError(
            "optimizer holds no trainable parameter of model; expected at least one. Set requires_grad on what was "
            "trained (PEFT: load the adapter with is_trainable=True)"
        )
    check_values(stored, None if zero is None else any_on_processes)
    exp_avg, exp_avg_sq, maximum = (
        cast(Params, ComputedTensors(reads)) if key in computed else {name: read() for name, read in reads.items()}
        for key, reads in moments.items()
    )
    values = AdamWState(exp_avg, exp_avg_sq, maximum, steps, hyper, lr)
    if partition is None:
        return values
    masters = {name: x for name, x in master_weights(zero, partition, parameters).items() if name in hyper}
    return _partitioned(values._replace(master_weights=masters or None), partition, copy)


def _partitioned(state: AdamWState, partition: Partition, copy: bool) -> AdamWState:
    """Return a state whose tensors are shards with complete ones, gathered at each access, or here to be copies."""
    trees: dict[str, Any] = {}
    for key in (*MOMENTS, "master_weights"):
        shards = getattr(state, key)
        if shards is not None:
            shards = partition.gather_(dict(shards)) if copy else PartitionedTensors(shards, partition)
        trees[key] = shards
    return state._replace(**trees)


def _unwrap(optimizer: Any) -> Any:
    """Return the optimizer inside wrappers that hold it as ``.optimizer``."""
    while not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        inner = getattr(optimizer, "optimizer", None)
        if why_refused(optimizer) or not (isinstance(inner, torch.optim.Optimizer) or is_zero_optimizer(inner)):
            break
        optimizer = inner
    return optimizer


def require_adamw(optimizer: Any) -> Any:
    """Return the AdamW inside any wrappers; raise ``TypeError`` for another optimizer."""
    optimizer = _unwrap(optimizer)
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    if is_low_bit(optimizer):
        problem = why_not_adamw(optimizer)
        if problem is not None:
            raise TypeError(f"optimizer is {kind}, whose step is not AdamW's: {problem}")
        return optimizer
    # AdamW is a subclass of Adam only in recent torch, and torch 2.1 has no decoupled_weight_decay in Adam.
    is_adamw = isinstance(optimizer, torch.optim.AdamW)
    if not is_adamw and not isinstance(optimizer, torch.optim.Adam):
        refusal = why_refused(optimizer)
        if refusal is not None:
            raise TypeError(refusal)
        raise TypeError(f"optimizer is {kind}, whose step is not AdamW's; {SUPPORTED}")
    for index, group in enumerate(optimizer.param_groups):
        if group["weight_decay"] != 0 and not group.get("decoupled_weight_decay", is_adamw):
            raise TypeError(
                f"optimizer is {kind} with decoupled_weight_decay=False in param_groups[{index}], so its weight decay "
                f"of {group['weight_decay']} is part of the gradient; {SUPPORTED}"
            )
    return optimizer


def rounds_at_random(optimizer: Any) -> bool:
    """Return whether an optimizer, inside any wrappers, rounds the weights at random, as torchao's may."""
    return bool(getattr(_unwrap(optimizer), "bf16_stochastic_round", False))


def _reference_lr_and_scales(groups: list[dict[str, Any]]) -> tuple[float, list[float]]:
    """Return lr_ref and the ratio rho of each group."""
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


def _read_hyper(group: dict[str, Any], lr_scale: float) -> AdamWHyper:
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


def _trainable_by_name(parameters: list[Tensor], names: dict[Tensor, str], group: int) -> list[tuple[str, Tensor]]:
    """Return the trainable parameters of a group with their names; refuse one that is not the model's."""
    trainable = []
    for index, parameter in enumerate(parameters):
        if parameter not in names:
            raise ValueError(
                f"param_groups[{group}]['params'][{index}] of shape {tuple(parameter.shape)} is not a parameter of "
                "model; expected those of model.named_parameters(). Pass the very module whose parameters the "
                "optimizer was built with"
            )
        if parameter.requires_grad:
            trainable.append((names[parameter], parameter))
    return trainable


def _checked_moment(
    name: str, key: str, parameter: Tensor, state: dict[str, Any], partition: FlatPartition | None
) -> StoredMoment:
    """Return one moment of a parameter, its kind checked; zeros before the first step.

    Args:
        name: of the parameter.
        key: of the moment.
        parameter: of the model, or its shard.
        state: that the optimizer has for it, or for the part of its group's vector.
        partition: of the vectors; None where the state is the parameter's own.
    """
    if not state:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        zeros = functools.partial(torch.zeros_like, parameter, dtype=dtype, requires_grad=False)
        return StoredMoment(parameter.shape, False, zeros)
    moment = stored_moment(state, key)
    if moment is None:
        raise ValueError(f"optimizer state of {name} has no {key!r} (it has {sorted(state)}); {SUPPORTED}")
    if partition is not None:
        return StoredMoment(parameter.shape, False, functools.partial(partition.shard_of_part, name, moment.read()))
    if moment.shape != parameter.shape:
        raise ValueError(
            f"optimizer state {key} of {name} has shape {tuple(moment.shape)}; expected the parameter's, "
            f"{tuple(parameter.shape)}. This is the state of another model: pass the one saved with these weights"
        )
    value = moment.read()
    if is_sharded(value) != is_sharded(parameter):
        raise ValueError(
            f"optimizer state {key} of {name} and the parameter are a DTensor and a plain tensor; expected both of "
            "one kind. Make the optimizer after fully_shard, or load its state with restore_optimizer"
        )
    return moment


def _converted(moment: StoredMoment, parameter: Tensor, copy: bool) -> Tensor:
    """Return a moment in at least float32, on the parameter's device."""
    value = moment.read()
    dtype = torch.promote_types(value.dtype, torch.promote_types(parameter.dtype, torch.float32))
    return value.to(device=parameter.device, dtype=dtype, copy=copy and not moment.is_computed)


def _same(value: Tensor) -> Tensor:
    return value


def _read_step(name: str, state: dict[str, Any]) -> int:
    """Return the number of updates of a parameter, 0 before the first."""
    if not state:
        return 0
    step = _number(f"optimizer state step of {name}", state.get("step", math.nan))
    if step < 0 or step != int(step):
        raise ValueError(
            f"optimizer state step of {name} is {step}; expected a whole number >= 0, the count of updates"
        )
    return int(step)


def _number(field: str, value: Any) -> float:
    """Return a finite float, also from a tensor of one element."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{field} is {number}; expected a finite number. Set it in the optimizer")
    return number
