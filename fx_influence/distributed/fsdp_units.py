"""Modules of a sharded model that are run one by one, each on weights gathered for it, and the passes over them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from fx_influence.distributed.fsdp_gather import PendingGather, gather, reduce_scatter
from fx_influence.types import Params


class Unit(NamedTuple):
    """A module by its path, and the parameters that it holds: (path of the owner, attribute there, name)."""

    path: str
    places: list[tuple[str, str, str]]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for _, _, name in self.places))


class FsdpPass:
    """One pass over the units and back: what is whole at the moment, and what is on its way.

    ``known``: the DTensors of all units by name; those that require a gradient are leaves. ``moving``: their tangents.
    """

    def __init__(self, units: Sequence[Unit], known: Params, moving: Params) -> None:
        self.units = units
        self._shards = [{name: known[name] for name in unit.names} for unit in units]
        self._moving = [{name: moving[name] for name in unit.names if name in moving} for unit in units]
        self._packed: set[int] = set()
        self._on_its_way: dict[int, PendingGather] = {}
        self._whole: dict[int, tuple[Params, Params]] = {}

    def run(self, k: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward of unit k, a module of meta tensors, on its weights; those of the next arrive meanwhile."""
        weights, tangents = self.take(k, k + 1 if k + 1 < len(self.units) else None)
        if torch.is_grad_enabled():
            hooks: contextlib.AbstractContextManager[None] = self._without_weights(k, weights)
            weights = attached(weights, self._shards[k], functools.partial(self.free, k))
        else:
            hooks = contextlib.nullcontext()
            weights = weights | {name: forward_ad.make_dual(weights[name], v) for name, v in tangents.items()}
        try:
            with _holding(module, self.units[k], weights), hooks:
                return type(module).forward(module, *args, **kwargs)
        finally:
            self.free(k)

    def take(self, k: int, then: int | None) -> tuple[Params, Params]:
        """The whole weights of unit k and their tangents; of the others, at most those of ``then`` are on their way."""
        if k not in self._whole:
            self._whole.clear()
            for other in self._on_its_way.keys() - {k}:
                self._on_its_way.pop(other).wait()
            self._whole[k] = self._arrived(k)
            if then is not None:
                self._on_its_way[then] = self._started(then)
        return self._whole[k]

    def free(self, k: int) -> None:
        self._whole.pop(k, None)

    def _started(self, k: int) -> PendingGather:
        with torch.no_grad():
            return gather([*self._shards[k].values(), *self._moving[k].values()])

    def _arrived(self, k: int) -> tuple[Params, Params]:
        whole = (self._on_its_way.pop(k) if k in self._on_its_way else self._started(k)).whole()
        count = len(self._shards[k])
        return (
            dict(zip(self._shards[k], whole[:count], strict=True)),
            dict(zip(self._moving[k], whole[count:], strict=True)),
        )

    def _without_weights(self, k: int, weights: Params) -> contextlib.AbstractContextManager[None]:
        """A graph made inside keeps no weight: where backward wants one, the unit is gathered again."""
        names = {w.untyped_storage().data_ptr(): name for name, w in weights.items() if w.numel()}
        # Hooks do not add up, and the caller may have some to see what the graph keeps.
        around = torch._C._autograd._top_saved_tensors_default_hooks(False)
        outer_pack, outer_unpack = around or (lambda x: x, lambda x: x)

        def pack(x: Tensor) -> Any:
            name = names.get(x.untyped_storage().data_ptr())
            if name is None:
                return outer_pack(x)
            self._packed.add(k)
            return _View(name, x.dtype, x.size(), x.stride(), int(x.storage_offset()))

        def unpack(kept: Any) -> Tensor:
            if not isinstance(kept, _View):
                return outer_unpack(kept)
            weight = self.take(k, max((j for j in self._packed if j < k), default=None))[0][kept.name]
            return weight.view(kept.dtype).as_strided(kept.size, kept.stride, kept.offset)

        return saved_tensors_hooks(pack, unpack)


class _View(NamedTuple):
    """Of a weight, in place of itself in a graph."""

    name: str
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextlib.contextmanager
def running(template: nn.Module, sweep: FsdpPass) -> Iterator[None]:
    """While active, a call of the template runs its units through the sweep."""
    modules = [template.get_submodule(unit.path) for unit in sweep.units]
    for k, module in enumerate(modules):
        vars(module)["forward"] = functools.partial(sweep.run, k, module)
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["forward"]


@contextlib.contextmanager
def _holding(module: nn.Module, unit: Unit, weights: Params) -> Iterator[None]:
    start = len(unit.path)
    held: list[tuple[dict[str, Any], str, str]] = [
        (module.get_submodule(owner[start:].lstrip("."))._parameters, leaf, name) for owner, leaf, name in unit.places
    ]
    meta = [parameters[leaf] for parameters, leaf, _ in held]
    for parameters, leaf, name in held:
        parameters[leaf] = weights[name]
    try:
        yield
    finally:
        for (parameters, leaf, _), before in zip(held, meta, strict=True):
            parameters[leaf] = before


def attached(whole: Params, shards: Params, behind: Callable[[], None] = lambda: None) -> Params:
    """Whole tensors with the history of their shards, DTensors: the gradient is summed and scattered to these.

    It is the sum over the ranks that hold the shards, still partial over those that hold copies, as its placements say.
    ``behind`` is called once it has passed.
    """
    moving = {name: x for name, x in shards.items() if x.requires_grad}
    if not moving:
        return whole
    own = [_with_partial_gradient(x) for x in moving.values()]
    detached = [x.detach() for x in moving.values()]
    return whole | dict(
        zip(moving, _Attached.apply(behind, detached, [whole[name] for name in moving], *own), strict=True)
    )


def _with_partial_gradient(shard: Any) -> Tensor:
    from torch.distributed.tensor import Partial

    own: Tensor = shard.to_local(grad_placements=[Partial() if x.is_replicate() else x for x in shard.placements])
    return own


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, behind: Callable[[], None], shards: list[Tensor], whole: list[Tensor], *own: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.behind, ctx.shards = behind, shards
        ctx.set_materialize_grads(False)
        return tuple(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.behind()
        sums = reduce_scatter(grads, ctx.shards)
        return None, None, None, *(None if g is None else g.to(x.dtype) for g, x in zip(sums, ctx.shards, strict=True))
