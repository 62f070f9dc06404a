"""Passes whose rows are dealt to the ranks of a device mesh: every rank takes its own and has the whole result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fx_influence.autodiff.engine import Engine
from fx_influence.autodiff.ghost import JvpFn
from fx_influence.autodiff.gradients import LinearOutputCaches
from fx_influence.batching.microbatch import TOKENS_PER_CHUNK
from fx_influence.batching.prefix_packing import shared_prompt_index
from fx_influence.batching.rows import select_rows
from fx_influence.core.checks import wrong_type
from fx_influence.core.dtensor import is_sharded
from fx_influence.core.tree import promote, shift
from fx_influence.distributed.batches import gather_batch
from fx_influence.distributed.collectives import (
    all_gather,
    all_gather_objects,
    mesh_rank,
    sum_over_ranks,
)
from fx_influence.distributed.consistency import check_consistent, comparable_facts
from fx_influence.distributed.partition import RowPartition, _blocks_down, _cut, partition_rows
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Gradients, Params, TokenValues

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def make_engine(
    params: Params, apply: Apply, temperature: float, chunk_size: int | None, mesh: DeviceMesh | None
) -> Engine:
    """The passes of this process alone, or with a mesh those of its ranks together.

    Sharded parameters bring their own mesh. Raises ``ValueError`` where another is given with them.
    """
    if mesh is not None and not hasattr(mesh, "get_group"):
        remedy = "Make one by torch.distributed.device_mesh.init_device_mesh, or pass None for a single process"
        raise wrong_type("mesh", mesh, "a DeviceMesh", remedy)
    first: Any = next(iter(params.values()))
    if not is_sharded(first):
        return (
            Engine(apply, temperature, chunk_size)
            if mesh is None
            else DataParallelEngine(apply, temperature, chunk_size, mesh=mesh)
        )
    own = first.device_mesh
    if mesh is not None and not torch.equal(mesh.mesh.flatten(), own.mesh.flatten()):
        raise ValueError(f"mesh is {mesh}, the parameters are sharded over {own}; pass that one, or None")
    return FsdpEngine(apply, temperature, chunk_size, mesh=own)


@dataclass(frozen=True, kw_only=True)
class DataParallelEngine(Engine):
    """``Engine`` over the ranks of ``mesh``: batches, parameters and directions are the same on each, the work is not.

    Rows are dealt by length, so that no rank has more to do than another, and by prompt where passes share these; a
    rank's passes are those of ``Engine`` over its own rows. Gradients are summed by one all-reduce; what belongs to
    rows or tokens is gathered; a JVP and a kernel need nothing else from other ranks. In float64 results agree with
    those of one process to rounding.
    """

    mesh: DeviceMesh

    def full_batch(self, field: str, batch: Batch) -> Batch:
        return gather_batch(self.mesh, field, batch)

    def check_consistent(self, **facts: object) -> None:
        facts |= {"temperature": self.temperature, "chunk_size": self.chunk_size}
        compared = (pair for name, value in facts.items() for pair in comparable_facts(name, value))
        check_consistent(self.mesh, dict(compared))

    def values(self, params: Params, batch: Batch) -> TokenValues:
        partition, local = self._partition(batch), self._local(params, batch)
        return partition.whole_values(local.passes.values(local.params, partition.own(batch)))

    def perturbed_values(
        self, params: Params, block: Params, eta: float, batch: Batch, vmapped: bool = True
    ) -> TokenValues:
        partition, local = self._partition(batch), self._local(params, batch)
        return partition.whole_values(
            local.passes.perturbed_values(local.params, block, eta, partition.own(batch), vmapped)
        )

    def can_vmap_directions(self, params: Params, batch: Batch) -> bool:
        # Each rank's own: all have as many rows, and its route is the same for whatever it compares.
        partition, local = self._partition(batch), self._local(params, batch)
        return local.passes.can_vmap_directions(local.params, partition.own(batch))

    def gradient_with_cache(
        self, params: Params, batch: Batch, memory_budget: int
    ) -> tuple[Gradients, LinearOutputCaches | None]:
        partition, local = self._partition(batch), self._local(params, batch)
        own, caches = local.passes.gradient_with_cache(local.params, partition.own(batch), memory_budget)
        return self._summed(params, own), caches

    def reweighted_gradient(
        self, params: Params, batch: Batch, coefficients_fn: Callable[[TokenValues], Batch], memory_budget: int
    ) -> tuple[Batch, Gradients]:
        partition, local = self._partition(batch), self._local(params, batch)
        weighted: list[Batch] = []

        def weigh_own(values: TokenValues) -> Batch:
            weighted.append(coefficients_fn(partition.whole_values(values)))
            return partition.own(weighted[0])

        _, own = local.passes.reweighted_gradient(local.params, partition.own(batch), weigh_own, memory_budget)
        return weighted[0], self._summed(params, own)

    def jvp(
        self, params: Params, direction: Params, batch: Batch, caches: LinearOutputCaches | None = None
    ) -> TokenValues:
        partition, local = self._partition(batch), self._local(params, batch, direction)
        return partition.whole_values(local.passes.jvp(local.params, local.direction, partition.own(batch), caches))

    def linearize(
        self, params: Params, batch: Batch, memory_budget: int, at_once: int
    ) -> tuple[Gradients, JvpFn] | None:
        partition, local = self._partition(batch), self._local(params, batch)
        found = local.passes.linearize(local.params, partition.own(batch), memory_budget, at_once)
        if not all(all_gather_objects(self.mesh, found is not None)):
            return None
        assert found is not None
        gradient, contract = found
        return self._summed(params, gradient), lambda us: partition.whole(contract(us), axis=1)

    def gram(
        self, params: Params, batch_a: Batch, batch_b: Batch, diagonal: Params, memory_budget: int, apply_b: Apply
    ) -> Tensor:
        # Each rank has a block of the matrix, and needs the gradients of the block's rows and columns alone.
        shape, rank = (len(batch_a.input_ids), len(batch_b.input_ids)), mesh_rank(self.mesh)
        down = _blocks_down(*shape, self.mesh.size())
        cuts = zip(shape, (down, self.mesh.size() // down), strict=True)
        a, b = (_cut(count, pieces, batch_a.input_ids.device) for count, pieces in cuts)
        own = select_rows(batch_a, a[rank // len(b)]), select_rows(batch_b, b[rank % len(b)])
        local = self._local(params, batch_a).passes
        blocks = all_gather(self.mesh, local.gram(params, *own, diagonal, memory_budget, apply_b))
        out = blocks.new_empty(shape)
        for k, block in enumerate(blocks):
            out[a[k // len(b)].unsqueeze(1), b[k % len(b)]] = block
        return out

    def curvature(self, params: Params, direction: Params, batch: Batch) -> Tensor:
        partition, local = self._partition(batch), self._local(params, batch, direction)
        return all_gather(self.mesh, local.passes.curvature(local.params, local.direction, partition.own(batch))).sum()

    def _partition(self, batch: Batch) -> RowPartition:
        return partition_rows(
            batch, self.mesh, shared_prompt_index(batch) if split_policy(self.apply).prefix_shareable else None
        )

    def _local(self, params: Params, batch: Batch, direction: Params | None = None) -> _LocalInputs:
        return _LocalInputs(Engine(self.apply, self.temperature, self.chunk_size), params, direction or {})

    def _summed(self, params: Params, gradient: Gradients) -> Gradients:
        """The sum over ranks, by name; None where no rank's rows reach a parameter."""
        by_rank = all_gather_objects(self.mesh, [g is not None for g in gradient.values()])
        out: Gradients = {}
        for (name, g), reached in zip(gradient.items(), map(any, zip(*by_rank, strict=True)), strict=True):
            p = params[name]
            out[name] = torch.zeros_like(p, dtype=promote(p.dtype)) if g is None and reached else g
        sum_over_ranks(self.mesh, [g for g in out.values() if g is not None])
        return out


@dataclass(frozen=True, kw_only=True)
class FsdpEngine(DataParallelEngine):
    """``DataParallelEngine`` over ranks that hold a part of the parameters each; ``apply`` is a ``ShardedPolicy``.

    Every rank makes the same number of passes, as the collectives inside them need. There is no kernel, no contraction
    and no curvature: rows' gradients and nested derivatives are out of a sharded policy's reach.
    """

    def check_gram(self, asked_by: str) -> None:
        raise ValueError(
            f"{asked_by} needs the gradient of every row, which a model sharded by FSDP2 has not; leave it out, "
            "or load the model whole in each process and pass mesh="
        )

    def can_vmap_directions(self, params: Params, batch: Batch) -> bool:
        return False

    def perturbed_values(
        self, params: Params, block: Params, eta: float, batch: Batch, vmapped: bool = True
    ) -> TokenValues:
        moved = []
        for k in range(len(next(iter(block.values())))):
            moved.append(self.values(shift(params, {name: v[k] for name, v in block.items()}, eta), batch))
        return TokenValues(*(torch.stack(field) for field in zip(*moved, strict=True)))

    def gradient_with_cache(
        self, params: Params, batch: Batch, memory_budget: int
    ) -> tuple[Gradients, LinearOutputCaches | None]:
        # A budget may be spent at another part on another rank, which would then make other passes.
        return super().gradient_with_cache(params, batch, 0)

    def reweighted_gradient(
        self, params: Params, batch: Batch, coefficients_fn: Callable[[TokenValues], Batch], memory_budget: int
    ) -> tuple[Batch, Gradients]:
        return super().reweighted_gradient(params, batch, coefficients_fn, 0)

    def linearize(self, params: Params, batch: Batch, memory_budget: int, at_once: int) -> None:
        return None

    def curvature(self, params: Params, direction: Params, batch: Batch) -> Tensor:
        return torch.full((), torch.nan, dtype=torch.float64, device=batch.input_ids.device)

    def _local(self, params: Params, batch: Batch, direction: Params | None = None) -> _LocalInputs:
        policy: Any = self.apply
        unsharded = policy.unsharded(params, direction or {})
        chunk_size = self.chunk_size or max(1, TOKENS_PER_CHUNK // batch.input_ids.shape[1])
        return _LocalInputs(Engine(unsharded.policy, self.temperature, chunk_size), unsharded.params, unsharded.tangent)

    def _summed(self, params: Params, gradient: Gradients) -> Gradients:
        policy: Any = self.apply
        return policy.closed(gradient, params)


class _LocalInputs(NamedTuple):
    """A rank's passes over its own rows, and what they are given."""

    passes: Engine
    params: Params
    direction: Params
