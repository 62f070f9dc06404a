"""Policy of a model sharded by FSDP2 or ZeRO-3: each unit's weights are gathered where it runs and freed afterwards."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fx_influence.batching.microbatch import MicroBatch
from fx_influence.core.dtensor import full_shape, is_flat, is_sharded, to_local
from fx_influence.core.tree import cast_floating, promote
from fx_influence.distributed.collectives import sum_over_groups
from fx_influence.distributed.fsdp_gather import reduce_scatter, shard_like, sharding_of, start_all_gather
from fx_influence.distributed.fsdp_model import (
    check_sharding,
    copy_without_fsdp,
    find_units,
    mixed_precision_dtype,
)
from fx_influence.distributed.fsdp_units import FsdpPass, FsdpUnit, attach_reduce_scatter, run_units_through
from fx_influence.policy.attention import math_attention
from fx_influence.policy.model.fitting import FittedForward
from fx_influence.policy.model.forward import Head, ModelForward
from fx_influence.policy.model.head import CutModel
from fx_influence.policy.model.template import Template
from fx_influence.policy.modes.forward_ad import forward_mode_jvp
from fx_influence.policy.policy import Policy
from fx_influence.types import Gradients, Params


class Unsharded(NamedTuple):
    """A sharded policy, its parameters and perhaps a direction, with everything root-managed gathered on every rank.

    Root-managed parameters, which belong to no unit, are plain tensors; those of units are DTensors as before.
    ``tangent``: the direction by name, or None.
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
        shapes: of the model's parameters by name, frozen ones too; their shards may be flat.
        param_dtype: dtype that parameters are cast to for a call, None for that of the shards.
    """

    units: Sequence[FsdpUnit] = ()
    tangents: Params = field(default_factory=dict)
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    param_dtype: torch.dtype | None = None

    @functools.cached_property
    def in_units(self) -> set[str]:
        """Names of the parameters that belong to a unit."""
        return {name for unit in self.units for name in unit.names}

    def is_root_managed(self, name: str, x: Tensor) -> bool:
        """Return whether a tensor is sharded and belongs to no unit, so that it is gathered for the full pass."""
        return is_sharded(x) and name not in self.in_units

    def call(self, template: Template, known: Params, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        if not any(map(is_sharded, known.values())):
            return super().call(template, self._cast_parameters(known), args, kwargs)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise ValueError(
                "apply is a ShardedPolicy; expected an unsharded one, since matrix=True, fisher_kernel and blocks "
                "of directions need transforms of torch.func. Pass matrix=False or load the model unsharded"
            )
        known = self._with_root_gathered(known)
        fsdp_pass = FsdpPass(self.units, known, self.tangents, self.shapes, self.param_dtype)
        with run_units_through(template.module, fsdp_pass):
            plain = {name: x for name, x in known.items() if not is_sharded(x)}
            return super().call(template, self._cast_parameters(plain), args, kwargs)

    def head_tensors(self, head: Head, params: Params) -> Params:
        names = set(head.names.values())
        known = {name: x for name, x in {**self.frozen, **params}.items() if name in names}
        return self._cast_parameters(self._with_root_gathered(known))

    def _cast_parameters(self, known: Params) -> Params:
        """Return plain tensors by name with the parameters among them in ``param_dtype``, differentiably."""
        parameters = {name: x for name, x in known.items() if name in self.shapes}
        return {**known, **cast_floating(parameters, self.param_dtype)}

    def _with_root_gathered(self, known: Params) -> Params:
        """Return tensors by name with the root-managed DTensors among them gathered, differentiably."""
        shards = {name: x for name, x in known.items() if self.is_root_managed(name, x)}
        gathered = zip(shards, _all_gather(list(shards.values())), strict=True)
        full = {name: x.view(self.shapes[name]) for name, x in gathered}
        return {**known, **(attach_reduce_scatter(full, shards) if torch.is_grad_enabled() else full)}


class ShardedPolicy(Policy):
    """The ``Policy`` of a model that FSDP2 has sharded: ``params`` are DTensors, and each rank passes different rows.

    A *unit* is a module that ``fully_shard`` was called on, except the model itself and modules that hold the output
    embeddings (the input's where these are tied) or share a parameter with another; under ZeRO-3, whose parameters are
    flat DTensors, a layer of the model. Its weights, frozen ones too, are
    gathered in one collective per dtype before it runs, while the previous unit computes, and freed afterwards.
    Backward gathers them again, in reverse, and scatters the sum over ranks of their gradient to the shards' owners. In
    forward mode a direction's shards are gathered with the weights. At most two units are unsharded at a time, units
    inside others not counted, besides the *root-managed* parameters, which belong to no unit: those are gathered for
    every pass over a micro-batch, or once for many passes between ``unshard`` and ``reduce_and_reshard``.

    All ranks of the mesh must make the same passes, over as many micro-batches. The derivatives are those of each
    rank's rows, but gradients of units' parameters are already summed over the ranks that share its shards. Passes
    compute in the dtype of the shards, and ``with_autocast`` follows a ``MixedPrecisionPolicy``. Transformations of
    ``torch.func`` raise ``ValueError``, so pairwise matrices and blocks of directions are not available.

    Args:
        model: the sharded model.
        position_ids: whether its forward is given position ids, see ``make_functional``.
        compiled: must be False.

    Attributes:
        mixed_precision: dtype that the model's ``MixedPrecisionPolicy`` casts parameters to, or None.

    Raises:
        ValueError: for ``compiled``, and for a model sharded in another way than by FSDP2 or ZeRO-3.
    """

    forward: ShardedForward
    mixed_precision: torch.dtype | None

    def __init__(self, model: nn.Module, position_ids: bool, compiled: bool = False) -> None:
        if compiled:
            raise ValueError("compiled is True for a sharded model; expected False. Leave compiled out")
        if not any(map(is_flat, model.parameters())):
            check_sharding(model)
        self.mixed_precision = mixed_precision_dtype(model)
        super().__init__(model, position_ids)

    def with_autocast(self, dtype: torch.dtype, loss_scale: float = 1.0) -> Policy:
        """Return the same policy as a trainer computes it under FSDP2's ``MixedPrecisionPolicy(param_dtype=dtype)``.

        Parameters are cast for each call, and with them all that is computed from them.
        """
        forward = dataclasses.replace(self.forward, param_dtype=dtype)
        return super().with_autocast(dtype, loss_scale).replace(forward=forward)

    def _with_raised(self, frozen: Params, dtype: torch.dtype) -> Policy:
        forward = dataclasses.replace(self.forward, frozen=frozen, param_dtype=None)
        return super()._with_raised(frozen, dtype).replace(forward=forward)

    def _cast(self, f: Callable[..., Any]) -> Callable[..., Any]:
        # Not by autocast, whose cast weights the graph would hold on to once the unit's own are freed.
        return f

    def unshard(self, params: Params, tangent: Params | None = None) -> Unsharded:
        """Return policy, parameters and direction with everything root-managed gathered, one collective per dtype."""
        trees = [self.forward.frozen, params, tangent or {}]
        entries = ((k, name, x) for k, tree in enumerate(trees) for name, x in tree.items())
        keys = [(k, name) for k, name, x in entries if self.forward.is_root_managed(name, x)]
        gathered = [dict(tree) for tree in trees]
        for (k, name), x in zip(keys, _all_gather([trees[k][name] for k, name in keys]), strict=True):
            gathered[k][name] = x.view(self.forward.shapes[name])
        policy = self.replace(forward=dataclasses.replace(self.forward, frozen=gathered[0]))
        return Unsharded(policy, gathered[1], None if tangent is None else gathered[2])

    def reduce_and_reshard(self, gradients: Gradients, params: Params) -> Gradients:
        """Return gradients summed over all ranks, as DTensors.

        Args:
            gradients: of each rank's rows, by name, from passes of an ``Unsharded`` policy.
            params: the sharded parameters, by name.

        Returns:
            DTensors sharded as ``params``. A gradient that is None on every rank stays None; on some, it counts as 0.
        """
        local = {name: None if g is None else to_local(g) for name, g in gradients.items()}
        root_managed = [name for name in local if name not in self.forward.in_units]
        if root_managed:
            sums = reduce_scatter([local[name] for name in root_managed], [params[name] for name in root_managed])
            local |= dict(zip(root_managed, sums, strict=True))
        return _sum_over_copies(local, params)

    def _backbone_jvp(
        self, params: Params, tangent: Params, micro_batch: MicroBatch, outputs: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        # Gathered before any tensor is dual, because a collective would lose the tangents.
        policy, params, gathered = self.unshard(params, tangent)
        assert gathered is not None
        shards = {name: v for name, v in gathered.items() if is_sharded(v)}
        policy = policy.replace(forward=dataclasses.replace(policy.forward, tangents=shards))
        plain = {name: v for name, v in gathered.items() if not is_sharded(v)}
        with torch.no_grad(), math_attention():
            return forward_mode_jvp(lambda p: policy._backbone(p, micro_batch), params, plain, outputs)

    def _make_forward(self, model: nn.Module, module: nn.Module, position_ids: bool) -> ShardedForward:
        shapes = {name: full_shape(p) for name, p in model.named_parameters()}
        return ShardedForward.of(model, module, position_ids, units=find_units(model), shapes=shapes)

    def _supports_prefix_sharing(self, model: nn.Module, fitted: FittedForward, cut: CutModel) -> bool:
        # Ranks whose rows share different prompts would make different numbers of passes.
        return False

    def _copied(self, model: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """Deep-copy the model with its original classes and without FSDP hooks."""
        copy_without_fsdp(model, memo)
        return super()._copied(model, memo)


def _all_gather(shards: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return start_all_gather(shards).result() if shards else []


def _sum_over_copies(local: Gradients, params: Params) -> Gradients:
    """Return the sums over the ranks that hold copies of the same shards, as DTensors sharded as ``params``."""
    first_parameter: Any = next(iter(params.values()))
    mesh = first_parameter.device_mesh
    groups = [mesh.get_group(axis) for axis in range(sharding_of(first_parameter).axis)]
    reached: list[float] = [float(g is not None) for g in local.values()]
    if groups:
        counts = torch.tensor(reached, device=first_parameter.device)
        sum_over_groups(groups, [counts])
        reached = counts.tolist()
    out: Gradients = {}
    for (name, g), by_any_copy in zip(local.items(), reached, strict=True):
        p = params[name]
        out[name] = torch.zeros_like(to_local(p), dtype=promote(p.dtype)) if g is None and by_any_copy else g
    sum_over_groups(groups, [g for g in out.values() if g is not None])
    return {name: None if g is None else shard_like(g, params[name]) for name, g in out.items()}
