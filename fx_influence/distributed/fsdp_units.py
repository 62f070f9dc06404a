"""FSDP units of a sharded model, which run one by one on weights that are gathered for each and freed afterwards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import copy_context
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from fx_influence.core.tree import cast_floating, cast_like
from fx_influence.distributed.fsdp_gather import PendingGather, reduce_scatter, start_all_gather
from fx_influence.policy.modes.reloaded_weights import reload_on_backward
from fx_influence.types import Params


class FsdpUnit(NamedTuple):
    """A module whose parameters are gathered together.

    ``path``: of the module. ``slots``: of its parameters, each as (path of the owner, attribute there, name).
    """

    path: str
    slots: list[tuple[str, str, str]]

    @property
    def names(self) -> list[str]:
        """Names of its parameters, each once."""
        return list(dict.fromkeys(name for _, _, name in self.slots))


class FsdpPass:
    """FSDP schedule of one pass over the units and back: the unit that is unsharded, and the all-gathers under way.

    At most two units are unsharded or under way at a time.

    Args:
        units: in the order of the forward.
        known: the DTensors of all units by name; those that require a gradient are leaves.
        tangents: DTensors by name, gathered with the weights and made dual with them; empty for a plain pass.
        shapes: of the full weights by name; their shards may be flat.
        param_dtype: dtype that the gathered weights are cast to, None for that of the shards.
    """

    def __init__(
        self,
        units: Sequence[FsdpUnit],
        known: Params,
        tangents: Params,
        shapes: Mapping[str, torch.Size],
        param_dtype: torch.dtype | None = None,
    ) -> None:
        self.units, self._shapes, self._param_dtype = units, shapes, param_dtype
        self._shards = [{name: known[name] for name in unit.names} for unit in units]
        self._tangents = [{name: tangents[name] for name in unit.names if name in tangents} for unit in units]
        # A device runs its backward passes in a thread of its own, which has no context variables.
        self._context = copy_context()
        self._saved_by_graph: set[int] = set()
        self._pending: dict[int, PendingGather] = {}
        self._unsharded: dict[int, tuple[Params, Params]] = {}

    def run(self, k: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of unit k, a module of meta tensors, on its weights, while those of the next are gathered."""
        weights, tangents = self.unshard(k, k + 1 if k + 1 < len(self.units) else None)
        if torch.is_grad_enabled():
            hooks: contextlib.AbstractContextManager[None] = self._save_without_weights(k, weights)
            weights = attach_reduce_scatter(weights, self._shards[k], functools.partial(self.reshard, k))
        else:
            hooks = contextlib.nullcontext()
            weights = weights | {
                name: forward_ad.make_dual(weights[name], cast_like(v, weights[name])) for name, v in tangents.items()
            }
        try:
            with unit_weights(module, self.units[k], weights), hooks:
                return type(module).forward(module, *args, **kwargs)
        finally:
            self.reshard(k)

    def unshard(self, k: int, prefetch: int | None) -> tuple[Params, Params]:
        """Return the full weights of unit k and their tangents, and start to gather those of unit ``prefetch``.

        All-gathers of other units that are under way are waited for and dropped.
        """
        if k not in self._unsharded:
            self._unsharded.clear()
            for other in self._pending.keys() - {k}:
                self._pending.pop(other).wait()
            self._unsharded[k] = self._result(k)
            if prefetch is not None:
                self._pending[prefetch] = self._start(prefetch)
        return self._unsharded[k]

    def reshard(self, k: int) -> None:
        """Free the full weights of unit k."""
        self._unsharded.pop(k, None)

    def _start(self, k: int) -> PendingGather:
        with torch.no_grad():
            return start_all_gather([*self._shards[k].values(), *self._tangents[k].values()])

    def _result(self, k: int) -> tuple[Params, Params]:
        full = (self._pending.pop(k) if k in self._pending else self._start(k)).result()
        names, count = [*self._shards[k], *self._tangents[k]], len(self._shards[k])
        full = [x.view(self._shapes[name]) for name, x in zip(names, full, strict=True)]
        return (
            cast_floating(dict(zip(names[:count], full[:count], strict=True)), self._param_dtype),
            dict(zip(names[count:], full[count:], strict=True)),
        )

    def _save_without_weights(self, k: int, weights: Params) -> contextlib.AbstractContextManager[None]:
        """Return hooks under which a graph saves no weight of unit k; backward unshards the unit when it needs one."""

        def reload(name: str) -> Tensor:
            previous = max((j for j in self._saved_by_graph if j < k), default=None)
            return self._context.run(self.unshard, k, previous)[0][name]

        return reload_on_backward(weights, reload, functools.partial(self._saved_by_graph.add, k))


@contextlib.contextmanager
def run_units_through(template: nn.Module, fsdp_pass: FsdpPass) -> Iterator[None]:
    """Make calls of the template, inside the block, run its units through the pass."""
    modules = [template.get_submodule(unit.path) for unit in fsdp_pass.units]
    for k, module in enumerate(modules):
        vars(module)["forward"] = functools.partial(fsdp_pass.run, k, module)
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["forward"]


@contextlib.contextmanager
def unit_weights(module: nn.Module, unit: FsdpUnit, weights: Params) -> Iterator[None]:
    """Put the weights, by name, into the slots of a unit's module for the length of the block.

    Args:
        module: the unit's module, on the meta device.
        unit: the unit.
        weights: full weights by name.
    """
    start = len(unit.path)
    slots: list[tuple[dict[str, Any], str, str]] = [
        (module.get_submodule(owner[start:].lstrip("."))._parameters, attribute, name)
        for owner, attribute, name in unit.slots
    ]
    meta = [parameters[attribute] for parameters, attribute, _ in slots]
    for parameters, attribute, name in slots:
        parameters[attribute] = weights[name]
    try:
        yield
    finally:
        for (parameters, attribute, _), before in zip(slots, meta, strict=True):
            parameters[attribute] = before


def attach_reduce_scatter(full: Params, shards: Params, on_backward_done: Callable[[], None] = lambda: None) -> Params:
    """Return full tensors whose gradient backward sums over ranks and scatters to the shards.

    The gradient of a shard is the sum over the ranks among which the shards are distributed; it is still partial over
    ranks that hold copies, as its placements say.

    Args:
        full: full tensors by name.
        shards: their DTensors by name; only those that require a gradient get one.
        on_backward_done: called once backward has reached the full tensors.
    """
    trained = {name: x for name, x in shards.items() if x.requires_grad}
    if not trained:
        return full
    local = [_local_with_partial_gradient(x) for x in trained.values()]
    detached = [x.detach() for x in trained.values()]
    attached = _AttachReduceScatter.apply(on_backward_done, detached, [full[name] for name in trained], *local)
    return full | dict(zip(trained, attached, strict=True))


def _local_with_partial_gradient(shard: Any) -> Tensor:
    from torch.distributed.tensor import Partial

    local: Tensor = shard.to_local(grad_placements=[Partial() if x.is_replicate() else x for x in shard.placements])
    return local


class _AttachReduceScatter(torch.autograd.Function):
    """Return ``full`` unchanged, with the local shards as the inputs that its gradient goes to."""

    @staticmethod
    def forward(
        ctx: Any, on_backward_done: Callable[[], None], shards: list[Tensor], full: list[Tensor], *local: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.on_backward_done, ctx.shards = on_backward_done, shards
        ctx.context = copy_context()
        ctx.set_materialize_grads(False)
        return tuple(full)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.on_backward_done()
        sums = ctx.context.run(reduce_scatter, grads, ctx.shards)
        return None, None, None, *(None if g is None else g.to(x.dtype) for g, x in zip(sums, ctx.shards, strict=True))
