"""A model's structure without its weights, called on tensors that are passed to it by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fx_influence.core.dtensor import full_shape
from fx_influence.core.functional_call import functional_call
from fx_influence.policy.four_bit import four_bit_dtypes, four_bit_names, replace_four_bit, share_states
from fx_influence.types import Params

Copy = Callable[[nn.Module, dict[int, Any]], nn.Module]
"""``copied(model, memo)``: ``copy.deepcopy``, or a copy without what FSDP2 put into the model."""

_REGISTERED = frozenset(vars(nn.Module())) | {"_orig_mod"}


class Place(NamedTuple):
    """A parameter or buffer outside of registration: ``container[key]`` is the tensor ``name``."""

    container: Any
    key: Any
    name: str


class Template(NamedTuple):
    """A module on the meta device, and the places of the tensors that it is called on.

    Attributes:
        module: in eval mode, without weights.
        slots: path in the module -> name of the tensor, one for every registered attribute that holds it, so that a
            tied weight has several.
        places: the same for lists, dicts and plain attributes.
        stateful: modules whose attributes a forward rebinds; they are restored after each call, so that no call sees
            the changes of another.
    """

    module: nn.Module
    slots: dict[str, str]
    places: list[Place]
    stateful: list[nn.Module]

    def with_stateful(self, paths: Iterable[str]) -> Template:
        """Return the template with the modules at these paths as ``stateful``; other paths are ignored."""
        modules = dict(self.module.named_modules())
        return self._replace(stateful=[modules[path] for path in paths if path in modules])

    def __call__(self, known: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the module's forward returns for ``args`` and ``kwargs`` with the tensors ``known``, by name."""
        tensors = {path: known[name] for path, name in self.slots.items() if name in known}
        before = [_snapshot(module) for module in self.module.modules()]
        try:
            return self._call(tensors, known, args, kwargs)
        except BaseException:
            # A forward that fails may leave changes that it would have undone, such as PEFT's parametrizations.
            for state in before:
                _restore(*state)
            raise

    def _call(self, tensors: Params, known: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.places and not self.stateful:
            return functional_call(self.module, tensors, args, kwargs)
        with _restored(self.stateful), _placed(self.places, known):
            return functional_call(self.module, tensors, args, kwargs)


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def _snapshot(module: nn.Module) -> tuple[nn.Module, type, dict[str, Any], list[dict[str, Any]]]:
    """Return a module with its class, its attributes and what it has registered."""
    return module, type(module), dict(vars(module)), [dict(vars(module)[key]) for key in _REGISTRIES]


def _restore(module: nn.Module, kind: type, attributes: dict[str, Any], registered: list[dict[str, Any]]) -> None:
    module.__class__ = kind
    vars(module).clear()
    vars(module).update(attributes)
    for key, entries in zip(_REGISTRIES, registered, strict=True):
        vars(module)[key].clear()
        vars(module)[key].update(entries)


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``, data parallelism or an engine, by whose names parameters are known.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> unwrap_model(nn.DataParallel(linear)) is linear
        True
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and (
            isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
            or type(model).__name__ == "DeepSpeedEngine"
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def meta_template(
    model: nn.Module, attention: str | None, copied: Copy = copy.deepcopy, experts: str | None = None
) -> Template:
    """Return the model in eval mode as a template, with meta tensors for its weights.

    Args:
        model: anything that ``unwrap_model`` returns; it is not changed, and no weight is copied.
        attention: name of an attention implementation of transformers; None leaves the model's.
        copied: how the structure is copied.
        experts: name of an implementation of a mixture's experts; "eager" has all derivatives, "batched_mm" a rule
            under vmap too. None leaves the model's.

    Raises:
        ValueError: a parameter is in a tuple.
    """
    # The memo makes deepcopy put meta tensors where the weights are, so no weight is copied and ties stay ties.
    memo: dict[int, Any] = {id(p): _meta_parameter(p) for p in model.parameters()}
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    # Tensors that are not parameters are shared, not copied: they may be large, and are read live as buffers are.
    memo |= {id(x): x for _, _, x in unregistered_tensors(model) if id(x) not in memo} | share_states(model)
    module = copied(model, memo).eval()
    _undo_patches(module)
    replace_four_bit(module, model)
    if attention is not None and is_hugging_face(module):
        try:
            base_model(module).set_attn_implementation(attention)
        except ValueError:
            # The architecture lacks this attention; each has the eager one.
            base_model(module).set_attn_implementation("eager")
    if experts is not None and hasattr(base_model(module), "set_experts_implementation"):
        base_model(module).set_experts_implementation(experts)
    names = tensor_names(module)
    places = [
        Place(container, key, names[id(x)]) for container, key, x in unregistered_tensors(module) if id(x) in names
    ]
    for container, _, name in places:
        if isinstance(container, tuple):
            raise ValueError(
                f"model parameter {name!r} is in a tuple, whose entries cannot be replaced; expected a registered "
                "attribute. Keep it in an nn.ParameterList, or read it from the module that owns it"
            )
    return Template(module, slots_of(module, names), places, [])


def tensor_names(module: nn.Module) -> dict[int, str]:
    """Return the name of every parameter and buffer by its id, the first that it has."""
    return {id(p): name for name, p in module.named_parameters()} | {id(b): n for n, b in module.named_buffers()}


def slots_of(module: nn.Module, names: dict[int, str]) -> dict[str, str]:
    """Return path -> name for every registered attribute that holds a tensor of ``names``."""
    slots = {}
    for path, owner in module.named_modules():
        for leaf, x in [*owner._parameters.items(), *owner._buffers.items()]:
            if x is not None:
                slots[f"{path}.{leaf}" if path else leaf] = names[id(x)]
    return slots


def module_paths(module: nn.Module, submodules: Iterable[nn.Module]) -> set[str]:
    """Return the paths in ``module`` of some of its submodules."""
    wanted = {id(submodule) for submodule in submodules}
    return {path for path, submodule in module.named_modules() if id(submodule) in wanted}


def unregistered_tensors(model: nn.Module) -> Iterator[tuple[Any, Any, Tensor]]:
    """Yield the tensors in plain attributes, lists, dicts and modules in these, as (container, key, tensor)."""
    seen = {id(module) for module in model.modules()}

    def inside(container: Any, items: Any) -> Iterator[tuple[Any, Any, Tensor]]:
        for key, value in items:
            if isinstance(value, Tensor):
                yield container, key, value
            elif isinstance(value, (list, tuple, dict)) and value and id(value) not in seen:
                seen.add(id(value))
                yield from inside(value, list(value.items() if isinstance(value, dict) else enumerate(value)))
            elif isinstance(value, nn.Module) and id(value) not in seen:
                for module in value.modules():
                    seen.add(id(module))
                    for registry in (module._parameters, module._buffers, _plain(module)):
                        yield from inside(registry if registry is not None else {}, list(registry.items()))

    for module in model.modules():
        attributes = vars(module)
        yield from inside(attributes, [(key, attributes[key]) for key in _plain(module)])


def _plain(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in _REGISTERED}


@contextmanager
def _placed(places: list[Place], known: Params) -> Iterator[None]:
    before = [container[key] for container, key, _ in places]
    try:
        for container, key, name in places:
            if name in known:
                container[key] = known[name]
        yield
    finally:
        for (container, key, _), value in zip(places, before, strict=True):
            container[key] = value


@contextmanager
def _restored(modules: list[nn.Module]) -> Iterator[None]:
    before = [module_state(module) for module in modules]
    try:
        yield
    finally:
        for module, state in zip(modules, before, strict=True):
            restore_state(module, state)


def module_state(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a module's attributes and buffers as they are bound now."""
    return dict(vars(module)), dict(module._buffers)


def restore_state(module: nn.Module, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Bind a module's attributes and buffers as they were when ``module_state`` returned ``state``."""
    attributes, buffers = state
    vars(module).clear()
    vars(module).update(attributes)
    module._buffers.clear()
    module._buffers.update(buffers)


def _meta_parameter(p: Tensor) -> nn.Parameter:
    # By shape, because empty_like of a DTensor would be a DTensor.
    return nn.Parameter(torch.empty(full_shape(p), dtype=p.dtype, device="meta"), requires_grad=False)


class _Wrapper(nn.Module):
    """The class of a module that calls the one it wraps, under the name ``INNER``, and does nothing else."""

    INNER: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules[self.INNER](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self.INNER), name)


class _Uncompiled(_Wrapper):
    """Takes the place of a module that ``torch.compile`` returned: a compiled one loses tangents (torch 2.13)."""

    INNER = "_orig_mod"


class _Unwrapped(_Wrapper):
    """Takes the place of torch's ``checkpoint_wrapper``, which would call the module again in the backward pass."""

    INNER = "_checkpoint_wrapped_module"


def _undo_patches(module: nn.Module) -> None:
    """Undo what trainers and kernel libraries did to a model's modules, in a copy of it."""
    for submodule in module.modules():
        # accelerate and kernel patches replace `forward` on the instance; torch.func needs that of the class.
        submodule.__dict__.pop("forward", None)
        submodule.__dict__["_compiled_call_impl"] = None
        for kind in (_Uncompiled, _Unwrapped):
            if kind.INNER in submodule._modules:
                submodule.__class__ = kind
        if hasattr(submodule, "gradient_checkpointing"):
            vars(submodule)["gradient_checkpointing"] = False
        for key, hook in list(submodule._forward_hooks.items()):
            # Trainers with checkpointing hook the embedding's output with requires_grad_(), an error under torch.func.
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del submodule._forward_hooks[key]
        drop_hook_handles(vars(submodule))


def drop_hook_handles(attributes: dict[str, Any]) -> None:
    """Drop the handles of hooks from a copied module: a copy of the copy fails on one whose hooks were not copied."""
    for key, value in attributes.items():
        if isinstance(value, RemovableHandle):
            attributes[key] = None
        elif isinstance(value, list) and any(isinstance(x, RemovableHandle) for x in value):
            attributes[key] = [x for x in value if not isinstance(x, RemovableHandle)]


def base_model(model: nn.Module) -> Any:
    """Return the model under PEFT's wrapper, or the model itself."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def is_hugging_face(model: nn.Module) -> bool:
    """Return whether a model lets its attention implementation be chosen, as those of transformers do."""
    return hasattr(base_model(model), "set_attn_implementation")


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the module that turns hidden states into logits, where the model tells."""
    base = base_model(model)
    head: nn.Module | None = base.get_output_embeddings() if hasattr(base, "set_output_embeddings") else None
    return head


def embeddings(module: nn.Module) -> Iterator[nn.Embedding]:
    """Yield the embeddings among a module's submodules."""
    return (submodule for submodule in module.modules() if isinstance(submodule, nn.Embedding))


def has_experts(model: nn.Module) -> bool:
    """Return whether a mixture of experts lets its implementation be chosen."""
    can_set: Any = getattr(base_model(model), "_can_set_experts_implementation", None)
    return can_set is not None and bool(can_set())


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the number of embedding rows, or None where the model does not tell."""
    get_input_embeddings: Any = getattr(model, "get_input_embeddings", None)
    return None if get_input_embeddings is None else getattr(get_input_embeddings(), "num_embeddings", None)


def lowest_weight_dtype(model: nn.Module) -> torch.dtype:
    """Return the coarsest floating dtype among a model's weights, and those that its 4-bit layers compute in."""
    codes = four_bit_names(model)
    dtypes = [p.dtype for name, p in model.named_parameters() if p.is_floating_point() and name not in codes]
    return max([*dtypes, *four_bit_dtypes(model)], key=lambda dtype: torch.finfo(dtype).eps)
