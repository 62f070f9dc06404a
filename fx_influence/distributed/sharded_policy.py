"""A policy whose parameters FSDP2 has sharded: each unit's weights are gathered where it runs and freed behind it."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fx_influence.batching.microbatch import MicroBatch
from fx_influence.core.dtensor import is_sharded, to_local
from fx_influence.core.tree import promote
from fx_influence.distributed.fsdp_gather import gather, reduce_scatter, shard_like, sharding_of
from fx_influence.distributed.fsdp_units import FsdpPass, Unit, attached, running
from fx_influence.policy.attention import math_attention
from fx_influence.policy.model.fitting import FittedForward
from fx_influence.policy.model.forward import Head, ModelForward
from fx_influence.policy.model.head import CutModel
from fx_influence.policy.model.template import Template, output_embeddings
from fx_influence.policy.modes.forward_ad import forward_mode_jvp
from fx_influence.policy.policy import Policy
from fx_influence.types import Gradients, Params


class Opened(NamedTuple):
    """A policy for passes over a rank's own rows, its parameters and, if there was one, a direction in their space.

    What no unit holds is a plain tensor there, whole on every rank; what a unit holds is a DTensor still.
    """

    policy: ShardedPolicy
    params: Params
    tangent: Params | None


@dataclass(frozen=True, eq=False)
class ShardedForward(ModelForward):
    """Rules for calling a sharded model: its tensors are gathered for each call.

    Attributes:
        units: the FSDP units, whose weights are gathered where each runs.
        tangents: shards of a direction that are gathered with the units' weights, by name.
    """

    units: Sequence[Unit] = ()
    tangents: Params = field(default_factory=dict)

    @functools.cached_property
    def in_units(self) -> set[str]:
        """Names of the parameters that some unit holds."""
        return {name for unit in self.units for _, _, name in unit.places}

    def is_loose(self, name: str, x: Tensor) -> bool:
        """Return whether a tensor is sharded and in no unit, so that it is gathered apart from the units."""
        return is_sharded(x) and name not in self.in_units

    def call(self, template: Template, known: Params, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        if not any(map(is_sharded, known.values())):
            return super().call(template, known, args, kwargs)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise ValueError(
                "a sharded policy stands in no transformation of torch.func, as per-sequence gradients (matrix=True, "
                "fisher_kernel) and blocks of directions are made by; take matrix=False, or load the model unsharded"
            )
        known = self._whole_where_loose(known)
        with running(template.module, FsdpPass(self.units, known, self.tangents)):
            whole = {name: x for name, x in known.items() if not is_sharded(x)}
            return super().call(template, whole, args, kwargs)

    def head_tensors(self, head: Head, params: Params) -> Params:
        names = set(head.names.values())
        return self._whole_where_loose({name: x for name, x in {**self.frozen, **params}.items() if name in names})

    def _whole_where_loose(self, known: Params) -> Params:
        loose = {name: x for name, x in known.items() if self.is_loose(name, x)}
        whole = dict(zip(loose, _gathered(list(loose.values())), strict=True))
        return {**known, **(attached(whole, loose) if torch.is_grad_enabled() else whole)}


class ShardedPolicy(Policy):
    """The ``Policy`` of a model that FSDP2 has sharded: ``params`` are DTensors, and each rank has rows of its own.

    A *unit* is a module that ``fully_shard`` was called on, apart from the model itself and from those that hold the
    output embeddings (the input's where these are tied) or share a parameter with another. Its weights, frozen ones
    too, are gathered in one collective per dtype before it runs, while the unit before computes, and freed behind it.
    Backward gathers them again, in reverse, and scatters the sum over ranks of their gradient to the shards' owners.
    A direction's shards are gathered with the weights in forward mode. At most two units are whole at a time, nested
    ones apart, besides what is in no unit: that is gathered for every pass over a part of a batch, or once for many
    between ``unsharded`` and ``closed``.

    All ranks of the mesh must make the same passes, over as many parts. The derivatives are those of each rank's rows,
    but gradients of what units hold come summed over the ranks that hold shards between them. Computed in the dtype of
    the shards: a ``MixedPrecisionPolicy`` of FSDP2 is not followed. Under transformations of ``torch.func`` it raises
    ``ValueError``: of matrices and of blocks of directions, it has none.
    """

    forward: ShardedForward

    def __init__(self, model: nn.Module, position_ids: bool, compiled: bool = False) -> None:
        if compiled:
            raise ValueError("compiled=True needs whole weights, the model's are sharded; leave compiled out")
        _check_sharding(model)
        super().__init__(model, position_ids)

    def with_autocast(self, dtype: torch.dtype, loss_scale: float = 1.0) -> Policy:
        raise ValueError(f"autocast is {dtype} for a sharded policy; expected a plain one. Leave it out")

    def unsharded(self, params: Params, tangent: Params | None = None) -> Opened:
        """The same with everything gathered that is in no unit, in one collective per dtype."""
        trees = [self.forward.frozen, params, tangent or {}]
        wanted = [
            (k, name) for k, tree in enumerate(trees) for name, x in tree.items() if self.forward.is_loose(name, x)
        ]
        out = [dict(tree) for tree in trees]
        for (k, name), x in zip(wanted, _gathered([trees[k][name] for k, name in wanted]), strict=True):
            out[k][name] = x
        policy = self.replace(forward=dataclasses.replace(self.forward, frozen=out[0]))
        return Opened(policy, out[1], None if tangent is None else out[2])

    def closed(self, gradients: Gradients, params: Params) -> Gradients:
        """Gradients over ranks' own rows by ``unsharded`` as DTensors sharded as ``params``, summed over all ranks.

        What is None on every rank stays None; on some, it counts as 0.
        """
        own = {name: None if g is None else to_local(g) for name, g in gradients.items()}
        loose = [name for name in own if name not in self.forward.in_units]
        if loose:
            sums = reduce_scatter([own[name] for name in loose], [params[name] for name in loose])
            own |= dict(zip(loose, sums, strict=True))
        return _over_copies(own, params)

    def _backbone_jvp(
        self, params: Params, tangent: Params, part: MicroBatch, outputs: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        # Gathered before there are tangents: a collective would lose them.
        policy, params, unsharded = self.unsharded(params, tangent)
        assert unsharded is not None
        shards = {name: v for name, v in unsharded.items() if is_sharded(v)}
        policy = policy.replace(forward=dataclasses.replace(policy.forward, tangents=shards))
        whole = {name: v for name, v in unsharded.items() if not is_sharded(v)}
        with torch.no_grad(), math_attention():
            return forward_mode_jvp(lambda p: policy._backbone(p, part), params, whole, outputs)

    def _make_forward(self, model: nn.Module, module: nn.Module, position_ids: bool) -> ShardedForward:
        return ShardedForward.of(model, module, position_ids, units=_units(model))

    def _supports_prefix_sharing(self, model: nn.Module, fitted: FittedForward, cut: CutModel) -> bool:
        # Ranks whose rows share other prompts would make other numbers of passes.
        return False

    def _copied(self, model: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """With the classes that FSDP2 replaced, and without its hooks."""
        sharded = [module for module in model.modules() if _is_fsdp(module)]
        for module in sharded:
            original = _original_class(module)
            memo[id(module)] = original.__new__(original)
        for module in sharded:
            vars(memo[id(module)]).update(copy.deepcopy(_own_state(module), memo))
        return super()._copied(model, memo)


def _gathered(shards: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return gather(shards).whole() if shards else []


def _over_copies(own: Gradients, params: Params) -> Gradients:
    """The sums over the ranks that hold copies of the same shards, as DTensors."""
    first: Any = next(iter(params.values()))
    groups = [first.device_mesh.get_group(axis) for axis in range(sharding_of(first).axis)]
    reached = torch.tensor([g is not None for g in own.values()], dtype=torch.float32, device=first.device)
    for group in groups:
        dist.all_reduce(reached, group=group)
    out: Gradients = {}
    for name, some in zip(own, reached.tolist() if groups else reached, strict=True):
        like: Any = params[name]
        g = own[name]
        if g is None and some:
            g = torch.zeros_like(to_local(like), dtype=promote(like.dtype))
        if g is None:
            out[name] = None
            continue
        for group in groups:
            dist.all_reduce(g, group=group)
        out[name] = shard_like(g, like)
    return out


def _is_fsdp(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _original_class(module: nn.Module) -> type[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    classes: tuple[Any, ...] = type(module).__mro__
    return next(cls for cls in classes if not issubclass(cls, FSDPModule))


def _own_state(module: nn.Module) -> dict[str, Any]:
    """Without what torch.distributed left in it: hooks, which gather and free the model's own weights, and records."""
    state = dict(vars(module))
    for key, value in state.items():
        if isinstance(value, dict) and key not in ("_parameters", "_modules"):
            state[key] = type(value)((k, x) for k, x in value.items() if not _is_distributed(x))
    return state


def _is_distributed(x: Any) -> bool:
    return (getattr(x, "__module__", None) or "").startswith("torch.distributed")


def _units(model: nn.Module) -> list[Unit]:
    names = {id(p): name for name, p in model.named_parameters()}
    paths = [path for path, module in model.named_modules() if path and _is_fsdp(module)]
    head = output_embeddings(model)
    homes: dict[int, set[str]] = {} if head is None else {id(p): {""} for p in head.parameters()}
    places: dict[str, list[tuple[str, str, str]]] = {path: [] for path in ["", *paths]}
    for owner, module in model.named_modules():
        above = [path for path in paths if f"{owner}.".startswith(f"{path}.")]
        home = max(above, key=len, default="")
        for leaf, p in module._parameters.items():
            if p is not None:
                homes.setdefault(id(p), set()).add(home)
                places[home].append((owner, leaf, names[id(p)]))
    shared = {names[key] for key, where in homes.items() if len(where) > 1}
    return [
        Unit(path, places[path])
        for path in paths
        if places[path] and not any(name in shared for _, _, name in places[path])
    ]


def _check_sharding(model: nn.Module) -> None:
    remedy = "shard the model by torch.distributed.fsdp.fully_shard alone, its layers first and then the model itself"
    modules = dict(model.named_modules())
    named: dict[str, Any] = dict(model.named_parameters())
    sharded = {name: p for name, p in named.items() if is_sharded(p)}
    mesh = next(iter(sharded.values())).device_mesh
    for name, p in sharded.items():
        *copies, last = p.placements
        by_fsdp = any(_is_fsdp(modules[path]) for path in _prefixes(name) if path in modules)
        if not by_fsdp or len(copies) > 1 or not all(x.is_replicate() for x in copies) or not _is_chunked(last):
            raise ValueError(
                f"model parameter {name!r} is a DTensor with {p.placements} on {p.device_mesh}, as tensor parallelism "
                f"makes them and FSDP2 does not; {remedy}"
            )
        if p.device_mesh != mesh or p.device.type != mesh.device_type:
            raise ValueError(
                f"model parameter {name!r} is on {p.device.type}, sharded over {p.device_mesh}, another over {mesh}; "
                "keep all on the devices of one mesh, without CPUOffloadPolicy"
            )
    for name in (name for name in named if name not in sharded):
        raise ValueError(
            f"model parameter {name!r} is a plain tensor among DTensors: gathered by its last forward, for which call "
            f"reshard() on the module that fully_shard was called on, or left out of it; {remedy}"
        )


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:k]) for k in range(len(parts)))


def _is_chunked(placement: Any) -> bool:
    # its subclass for tensor parallelism deals the chunks in another order
    return type(placement).__name__ == "Shard"
