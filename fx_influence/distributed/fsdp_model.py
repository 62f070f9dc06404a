"""Inspect a sharded model: find its units, check its sharding, and copy it without what shards it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fx_influence.core.dtensor import is_flat, is_sharded
from fx_influence.distributed.fsdp_units import FsdpUnit
from fx_influence.policy.model.template import output_embeddings


def find_units(model: nn.Module) -> list[FsdpUnit]:
    """Return the units of a sharded model, in the order of its modules: under ZeRO-3 its layers.

    Left out are the model itself, modules that hold the output embeddings (the input's where these are tied), and those
    that share a parameter with another unit: their parameters are root-managed.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    paths = _unit_paths(model)
    head = output_embeddings(model)
    homes: dict[int, set[str]] = {} if head is None else {id(p): {""} for p in head.parameters()}
    slots: dict[str, list[tuple[str, str, str]]] = {path: [] for path in ["", *paths]}
    for owner, module in model.named_modules():
        above = [path for path in paths if f"{owner}.".startswith(f"{path}.")]
        home = max(above, key=len, default="")
        for attribute, p in module._parameters.items():
            if p is not None:
                homes.setdefault(id(p), set()).add(home)
                slots[home].append((owner, attribute, names[id(p)]))
    shared = {names[key] for key, units in homes.items() if len(units) > 1}
    return [
        FsdpUnit(path, slots[path])
        for path in paths
        if slots[path] and not any(name in shared for _, _, name in slots[path])
    ]


def _unit_paths(model: nn.Module) -> list[str]:
    """Return the paths of the modules that FSDP2 gathers as one; under ZeRO-3, of the layers in the model's lists."""
    if not any(map(is_flat, model.parameters())):
        return [path for path, module in model.named_modules() if path and _is_fsdp(module)]
    layers: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{layer}.") for layer in layers):
            # The weight of a single linear map may be read without a call of it.
            layers += [f"{path}.{key}".lstrip(".") for key, child in module.named_children() if any(child.children())]
    return layers


def check_sharding(model: nn.Module) -> None:
    """Raise ``ValueError`` unless every parameter is sharded by FSDP2 alone, over one mesh and on its devices."""
    remedy = "Shard the model by torch.distributed.fsdp.fully_shard alone, its layers first and then the model itself"
    modules = dict(model.named_modules())
    parameters: dict[str, Any] = dict(model.named_parameters())
    sharded = {name: p for name, p in parameters.items() if is_sharded(p)}
    mesh = next(iter(sharded.values())).device_mesh
    for name, p in sharded.items():
        *copies, last = p.placements
        by_fsdp = any(_is_fsdp(modules[path]) for path in _prefixes(name) if path in modules)
        if not by_fsdp or len(copies) > 1 or not all(x.is_replicate() for x in copies) or not _is_chunked(last):
            raise ValueError(
                f"model parameter {name!r} is a DTensor with {p.placements} on {p.device_mesh}, as tensor "
                f"parallelism makes them; expected shards of FSDP2. {remedy}"
            )
        if p.device_mesh != mesh or p.device.type != mesh.device_type:
            raise ValueError(
                f"model parameter {name!r} is on {p.device.type} and sharded over {p.device_mesh}; expected the "
                f"devices of one mesh, {mesh}, as for the first parameter. Shard all over it, without "
                "CPUOffloadPolicy"
            )
    for name in (name for name in parameters if name not in sharded):
        raise ValueError(
            f"model parameter {name!r} is a plain tensor among DTensors; expected a DTensor. Its last forward "
            "gathered it (call reshard() on the module that fully_shard was called on), or it was left out of it. "
            f"{remedy}"
        )


def mixed_precision_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype that FSDP2's mixed precision casts parameters to; None for none, or for several."""
    modules: Iterator[Any] = (module for module in model.modules() if _is_fsdp(module))
    dtypes = {module._get_fsdp_state()._mp_policy.param_dtype for module in modules}
    return dtypes.pop() if len(dtypes) == 1 else None


def copy_without_fsdp(model: nn.Module, memo: dict[int, Any]) -> None:
    """Put into ``memo``, for ``copy.deepcopy``, copies of FSDP's modules with their original classes and without hooks.

    Args:
        model: the sharded model.
        memo: memo of a deep copy by id, changed in place.
    """
    copy_bare([module for module in model.modules() if _is_fsdp(module)], memo)


def copy_bare(modules: list[nn.Module], memo: dict[int, Any]) -> None:
    """Put into ``memo``, for ``copy.deepcopy``, copies of modules without what FSDP2 or DeepSpeed added to them.

    Args:
        modules: to be copied.
        memo: memo of a deep copy by id, changed in place.
    """
    for module in modules:
        original = _original_class(module)
        memo[id(module)] = original.__new__(original)
        # A handle that removes a hook refers to the dictionary with all hooks of that kind, FSDP's among them.
        memo |= {id(hooks): type(hooks)() for hooks in _hook_dictionaries(module).values()}
    for module in modules:
        state = copy.deepcopy(_bare_state(module), memo)
        for name, hooks in _hook_dictionaries(module).items():
            memo[id(hooks)].update(state[name])
            state[name] = memo[id(hooks)]
        vars(memo[id(module)]).update(state)


def _is_fsdp(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _original_class(module: nn.Module) -> type[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    classes: tuple[Any, ...] = type(module).__mro__
    return next(cls for cls in classes if not issubclass(cls, FSDPModule))


_OF_DEEPSPEED = (
    "_external_params",
    "_original_parameters",
    "applied_pre_backward_ref_cnt",
    "pre_bwd_fn",
    "post_bwd_fn",
)
"""Attributes that DeepSpeed (0.19.8) gives to modules, beside those named ``ds_...``."""


def _bare_state(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes without those of FSDP2 and DeepSpeed: records, and hooks that gather and free."""
    state = {key: x for key, x in vars(module).items() if key not in _OF_DEEPSPEED and not key.startswith("ds_")}
    for key, value in state.items():
        if key == "_parameters":
            # DeepSpeed's dictionary gathers parameters where they are read.
            state[key] = dict(value)
        elif isinstance(value, dict) and key != "_modules":
            state[key] = type(value)((k, x) for k, x in value.items() if not _is_distributed(x))
    return state


def _hook_dictionaries(module: nn.Module) -> dict[str, Any]:
    """Return the dictionaries of a module's hooks, by name of the attribute."""
    return {name: x for name, x in vars(module).items() if name.endswith("_hooks") and isinstance(x, dict)}


def _is_distributed(x: Any) -> bool:
    return (getattr(x, "__module__", None) or "").startswith(("torch.distributed", "deepspeed."))


def _prefixes(name: str) -> Iterator[str]:
    """Yield the paths of all modules that hold the parameter, the model's own empty path first."""
    parts = name.split(".")
    return (".".join(parts[:k]) for k in range(len(parts)))


def _is_chunked(placement: Any) -> bool:
    # By name, because its subclass for tensor parallelism orders the chunks in another way.
    return type(placement).__name__ == "Shard"
