"""Engines over several ranks: rows partitioned over the ranks of a device mesh, every rank given the full result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fx_influence.autodiff.engine import Engine
from fx_influence.autodiff.ghost import JvpFn, LossDerivatives, TokenDirections
from fx_influence.autodiff.gradients import LinearOutputCaches
from fx_influence.batching.microbatch import TOKENS_PER_CHUNK
from fx_influence.batching.prefix_packing import shared_prompt_index
from fx_influence.batching.rows import select_rows
from fx_influence.core.checks import wrong_type
from fx_influence.core.dtensor import is_sharded
from fx_influence.core.tree import promote, shift
from fx_influence.distributed.batches import gather_batch
from fx_influence.distributed.collectives import all_gather, all_gather_objects, mesh_rank, sum_over_ranks
from fx_influence.distributed.consistency import check_consistent, comparable_facts
from fx_influence.distributed.partition import RowPartition, partition_blocks, partition_rows
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Gradients, Params, TokenMoments, TokenValues

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def make_engine(
    params: Params, apply: Apply, temperature: float, chunk_size: int | None, mesh: DeviceMesh | None
) -> Engine:
    """Return the engine for these parameters: of one process, of a mesh's ranks, or of sharded parameters.

    Args:
        params: theta, by name. DTensors bring their own mesh.
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
        chunk_size: rows per forward; None chooses by tokens.
        mesh: ranks to share the work with; None for one process, or for the mesh of the parameters.

    Raises:
        TypeError: where ``mesh`` is not a device mesh.
        ValueError: where it is another one than that of the parameters.
    """
    if mesh is not None and not hasattr(mesh, "get_group"):
        remedy = "Make one by torch.distributed.device_mesh.init_device_mesh, or pass None for a single process"
        raise wrong_type("mesh", mesh, "a DeviceMesh", remedy)
    first_parameter: Any = next(iter(params.values()))
    if not is_sharded(first_parameter):
        if mesh is None:
            return Engine(apply, temperature, chunk_size)
        return DataParallelEngine(apply, temperature, chunk_size, mesh=mesh)
    parameter_mesh = first_parameter.device_mesh
    if mesh is not None and not torch.equal(mesh.mesh.flatten(), parameter_mesh.mesh.flatten()):
        raise ValueError(f"mesh is {mesh}; expected {parameter_mesh}, over which the parameters are sharded, or None")
    return FsdpEngine(apply, temperature, chunk_size, mesh=parameter_mesh)


@dataclass(frozen=True, kw_only=True)
class DataParallelEngine(Engine):
    """``Engine`` over the ranks of ``mesh``: batches, parameters and directions are the same on each, the work is not.

    Rows are partitioned by length, so that no rank has more to do than another, and by prompt where passes share
    prompts; each rank runs the methods of ``Engine`` on its rows. Gradients are summed by one all-reduce; results per
    row or token are gathered; a JVP and a Gram matrix need nothing else from other ranks. In float64 results agree with
    those of one process to rounding.
    """

    mesh: DeviceMesh

    def full_batch(self, field: str, batch: Batch) -> Batch:
        return gather_batch(self.mesh, field, batch)

    def full_tokens(self, batch: Batch, values: Tensor) -> Tensor:
        # Fields of a batch travel together, padded to the widest; this one takes the place of the coefficients.
        gathered = gather_batch(self.mesh, "batch_u", batch._replace(coefficients=values + 1.0)).coefficients
        assert gathered is not None
        return gathered.long() - 1

    def check_consistent(self, **arguments: object) -> None:
        arguments |= {"temperature": self.temperature, "chunk_size": self.chunk_size}
        facts = (fact for name, value in arguments.items() for fact in comparable_facts(name, value))
        check_consistent(self.mesh, dict(facts))

    def values(self, params: Params, batch: Batch) -> TokenValues:
        partition, local = self._partition(batch), self._local(params, batch)
        return partition.gather_values(local.engine.values(local.params, partition.local_rows(batch)))

    def moments(self, params: Params, batch: Batch) -> TokenMoments:
        partition, local = self._partition(batch), self._local(params, batch)
        return partition.gather_values(local.engine.moments(local.params, partition.local_rows(batch)))

    def perturbed_values(
        self, params: Params, directions: Params, eta: float, batch: Batch, vmapped: bool = True
    ) -> TokenValues:
        partition, local = self._partition(batch), self._local(params, batch)
        rows = partition.local_rows(batch)
        return partition.gather_values(local.engine.perturbed_values(local.params, directions, eta, rows, vmapped))

    def can_vmap_directions(self, params: Params, batch: Batch) -> bool:
        # Each rank decides for itself, because all have as many rows and a rank compares values of its own rows only.
        partition, local = self._partition(batch), self._local(params, batch)
        return local.engine.can_vmap_directions(local.params, partition.local_rows(batch))

    def gradient_with_cache(
        self, params: Params, batch: Batch, memory_budget: int
    ) -> tuple[Gradients, LinearOutputCaches | None]:
        partition, local = self._partition(batch), self._local(params, batch)
        rows = partition.local_rows(batch)
        gradient, caches = local.engine.gradient_with_cache(local.params, rows, memory_budget)
        return self._reduce(params, gradient), caches

    def gradients_by_group(
        self, params: Params, batch: Batch, groups: Sequence[Tensor], memory_budget: int
    ) -> list[Gradients]:
        by_group = (select_rows(batch, rows) if len(rows) else None for rows in groups)
        return [dict.fromkeys(params) if rows is None else self.gradient(params, rows) for rows in by_group]

    def reweighted_gradients(
        self,
        params: Params,
        batch: Batch,
        groups: Sequence[Tensor],
        coefficients_fn: Callable[[TokenValues], Sequence[Batch]],
        memory_budget: int,
        dtype: torch.dtype | None = None,
    ) -> tuple[Sequence[Batch], Iterator[Gradients]]:
        partition, local = self._partition(batch), self._local(params, batch)
        weighted: list[Batch] = []

        def local_coefficients_fn(values: TokenValues) -> Sequence[Batch]:
            weighted.extend(coefficients_fn(partition.gather_values(values)))
            return [partition.local_rows(batch) for batch in weighted]

        rows, local_groups = partition.local_rows(batch), [partition.local_index(index) for index in groups]
        _, gradients = local.engine.reweighted_gradients(
            local.params, rows, local_groups, local_coefficients_fn, memory_budget, dtype
        )
        return weighted, map(partial(self._reduce, params, dtype=dtype), gradients)

    def jvp(
        self, params: Params, direction: Params, batch: Batch, caches: LinearOutputCaches | None = None
    ) -> TokenValues:
        partition, local = self._partition(batch), self._local(params, batch, direction)
        rows = partition.local_rows(batch)
        return partition.gather_values(local.engine.jvp(local.params, local.direction, rows, caches))

    def linearize(
        self,
        params: Params,
        batch: Batch,
        memory_budget: int,
        num_directions: int,
        with_gradient: bool = True,
        groups: Sequence[Tensor] | None = None,
        parts: Sequence[Batch] = (),
    ) -> tuple[Gradients, JvpFn] | None:
        partition, local = self._partition(batch), self._local(params, batch)
        rows = partition.local_rows(batch)
        local_groups = None if groups is None else [partition.local_index(index) for index in groups]
        local_parts = [partition.local_rows(part) for part in parts]
        linearized = local.engine.linearize(
            local.params, rows, memory_budget, num_directions, with_gradient, local_groups, local_parts
        )
        if not all(all_gather_objects(self.mesh, linearized is not None)):
            return None
        assert linearized is not None
        gradient, jvp_fn = linearized

        def gathered(us: Sequence[Params], directions: TokenDirections | None) -> LossDerivatives:
            by_row, by_part, values = jvp_fn(us, directions)
            return LossDerivatives(
                partition.gather_rows(by_row, axis=1),
                partition.gather_rows(by_part, axis=2),
                None if values is None else partition.gather_values(values),
            )

        return self._reduce(params, gradient), gathered

    def gram(
        self, params: Params, batch_a: Batch, batch_b: Batch, diagonal: Params, memory_budget: int, apply_b: Apply
    ) -> Tensor:
        # Each rank computes one block of the matrix, and needs the gradients of that block's rows and columns only.
        shape = len(batch_a.input_ids), len(batch_b.input_ids)
        partition = partition_blocks(*shape, self.mesh.size(), batch_a.input_ids.device)
        index_a, index_b = partition.of_rank(mesh_rank(self.mesh))
        rows_a, rows_b = select_rows(batch_a, index_a), select_rows(batch_b, index_b)
        engine = self._local(params, batch_a).engine
        blocks = all_gather(self.mesh, engine.gram(params, rows_a, rows_b, diagonal, memory_budget, apply_b))
        out = blocks.new_empty(shape)
        for rank, block in enumerate(blocks):
            index_a, index_b = partition.of_rank(rank)
            out[index_a.unsqueeze(1), index_b] = block
        return out

    def curvature(self, params: Params, direction: Params, batch: Batch) -> Tensor:
        partition, local = self._partition(batch), self._local(params, batch, direction)
        rows = partition.local_rows(batch)
        return all_gather(self.mesh, local.engine.curvature(local.params, local.direction, rows)).sum()

    def _partition(self, batch: Batch) -> RowPartition:
        prompts = shared_prompt_index(batch) if split_policy(self.apply).prefix_shareable else None
        return partition_rows(batch, self.mesh, prompts)

    def _local(self, params: Params, batch: Batch, direction: Params | None = None) -> _LocalInputs:
        return _LocalInputs(Engine(self.apply, self.temperature, self.chunk_size), params, direction or {})

    def _reduce(self, params: Params, gradient: Gradients, dtype: torch.dtype | None = None) -> Gradients:
        """Return the sum over ranks, by name, in ``dtype``; None where the rows of no rank reach a parameter."""
        by_rank = all_gather_objects(self.mesh, [g is not None for g in gradient.values()])
        out: Gradients = {}
        for (name, g), reached in zip(gradient.items(), map(any, zip(*by_rank, strict=True)), strict=True):
            p = params[name]
            out[name] = torch.zeros_like(p, dtype=dtype or promote(p.dtype)) if g is None and reached else g
        sum_over_ranks(self.mesh, [g for g in out.values() if g is not None])
        return out


@dataclass(frozen=True, kw_only=True)
class FsdpEngine(DataParallelEngine):
    """``DataParallelEngine`` over ranks that hold a shard of the parameters each; ``apply`` is a ``ShardedPolicy``.

    Every rank runs the same number of passes, as the collectives inside them need. There is no Gram matrix, no
    ``linearize`` (None) and no curvature (NaN), because a sharded policy has no gradients per row and no nested
    derivatives.
    """

    def check_gram(self, asked_by: str) -> None:
        raise ValueError(
            f"params are sharded by FSDP2 or ZeRO-3; expected unsharded ones, since {asked_by} needs the gradient of "
            "every row. Leave it out, or load the unsharded model in each process and pass mesh="
        )

    def can_vmap_directions(self, params: Params, batch: Batch) -> bool:
        return False

    def perturbed_values(
        self, params: Params, directions: Params, eta: float, batch: Batch, vmapped: bool = True
    ) -> TokenValues:
        by_direction = []
        for k in range(len(next(iter(directions.values())))):
            direction = {name: v[k] for name, v in directions.items()}
            by_direction.append(self.values(shift(params, direction, eta), batch))
        return TokenValues(*(torch.stack(field) for field in zip(*by_direction, strict=True)))

    def gradient_with_cache(
        self, params: Params, batch: Batch, memory_budget: int
    ) -> tuple[Gradients, LinearOutputCaches | None]:
        # Budget 0, because ranks could exhaust a budget at different micro-batches and then run different passes.
        return super().gradient_with_cache(params, batch, 0)

    def reweighted_gradients(
        self,
        params: Params,
        batch: Batch,
        groups: Sequence[Tensor],
        coefficients_fn: Callable[[TokenValues], Sequence[Batch]],
        memory_budget: int,
        dtype: torch.dtype | None = None,
    ) -> tuple[Sequence[Batch], Iterator[Gradients]]:
        if len(groups) == 1:
            return super().reweighted_gradients(params, batch, groups, coefficients_fn, 0, dtype)
        # Each group is partitioned by itself, so that all ranks make as many passes for it.
        weighted = coefficients_fn(self.values(params, batch))

        def gradient_of(rows: Batch) -> Gradients:
            gradient = self.gradient(params, rows)
            return {name: None if g is None else g.to(dtype or g.dtype) for name, g in gradient.items()}

        by_group = [select_rows(weighted[0], index) for index in groups]
        return weighted, map(gradient_of, [*weighted[1:], *by_group])

    def linearize(
        self,
        params: Params,
        batch: Batch,
        memory_budget: int,
        num_directions: int,
        with_gradient: bool = True,
        groups: Sequence[Tensor] | None = None,
        parts: Sequence[Batch] = (),
    ) -> None:
        return None

    def curvature(self, params: Params, direction: Params, batch: Batch) -> Tensor:
        return torch.full((), torch.nan, dtype=torch.float64, device=batch.input_ids.device)

    def _local(self, params: Params, batch: Batch, direction: Params | None = None) -> _LocalInputs:
        policy: Any = self.apply
        unsharded = policy.unshard(params, direction or {})
        # One number for all ranks, because a number chosen by tokens depends on each rank's lengths.
        chunk_size = self.chunk_size or max(1, TOKENS_PER_CHUNK // batch.input_ids.shape[1])
        return _LocalInputs(Engine(unsharded.policy, self.temperature, chunk_size), unsharded.params, unsharded.tangent)

    def _reduce(self, params: Params, gradient: Gradients, dtype: torch.dtype | None = None) -> Gradients:
        policy: Any = self.apply
        return policy.reduce_and_reshard(gradient, params)


class _LocalInputs(NamedTuple):
    """Engine of this rank alone, with the parameters and the direction to call it with."""

    engine: Engine
    params: Params
    direction: Params
