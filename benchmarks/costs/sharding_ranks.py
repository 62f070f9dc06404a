"""Measure on each rank of the sharding benchmark: seconds, flops, bytes sent and peak memory."""

from __future__ import annotations

import copy
import gc
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fx_influence as fx
from benchmarks.costs.problems import Problem, Setting, problem
from benchmarks.harness import Work, flops, one_thread, peak_extra, seconds
from fx_influence.batching.rows import select_rows
from fx_influence.types import Batch

DIRECTIONS = 4
"""Directions of the finite steps."""


class SentBytes(TorchDispatchMode):
    """Count the bytes that this rank passes to collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = func._schema.name.removeprefix("c10d::").strip("_")
            inputs = args[0] if kind == "allreduce" else args[1]
            self.bytes[kind] = self.bytes.get(kind, 0) + sum(x.nbytes for x in _tensors(inputs))
            self.calls[kind] = self.calls.get(kind, 0) + 1
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class Case(NamedTuple):
    """Work done once by rank 0 with all rows, and once by all ranks, each with its share of the rows."""

    title: str
    by_rank0: Work
    by_all: Work


def cases(p: Problem, mesh: DeviceMesh) -> list[Case]:
    """Return the adjoint without and with error bars, matrix and finite steps, and the adjoint of a sharded model."""
    u, e = (_local_rows(batch, mesh) for batch in (p.u, p.e))
    block = {name: torch.stack([g * 10**-k for k in range(DIRECTIONS)]) for name, g in p.gain.items()}

    def adjoint(**options: Any) -> tuple[Work, Work]:
        return (
            lambda: fx.influence(p.params, p.u, p.e, p.state, apply=p.apply, **options),
            lambda: fx.influence(p.params, u, e, p.state, apply=p.apply, mesh=mesh, **options),
        )

    def finite() -> tuple[Work, Work]:
        return (
            lambda: fx.snis_sweep(p.params, p.e, apply=p.apply)(block, [1e-3]),
            lambda: fx.snis_sweep(p.params, e, apply=p.apply, mesh=mesh)(block, [1e-3]),
        )

    plain = adjoint(stderr=False)
    return [
        Case("adjoint", *plain),
        Case("adjoint, error bars", *adjoint()),
        Case("matrix", *adjoint(matrix=True, stderr=False)),
        Case(f"{DIRECTIONS} finite steps", *finite()),
        Case("adjoint, FSDP2", plain[0], _fully_sharded(p, mesh, u, e)),
    ]


def _local_rows(batch: Batch, mesh: DeviceMesh) -> Batch:
    rows = -(-len(batch.input_ids) // mesh.size())
    return select_rows(batch, slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows))


def _fully_sharded(p: Problem, mesh: DeviceMesh, u: Batch, e: Batch) -> Work:
    model: Any = copy.deepcopy(p.model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    apply, params = fx.make_functional(fully_shard(model, mesh=mesh))

    def shard(tree: dict[str, Tensor]) -> dict[str, Tensor]:
        shardings: dict[str, Any] = params
        return {name: distribute_tensor(x, mesh, shardings[name].placements) for name, x in tree.items()}

    state = p.state._replace(exp_avg=shard(p.state.exp_avg), exp_avg_sq=shard(p.state.exp_avg_sq))
    return lambda: fx.influence(params, u, e, state, apply=apply, stderr=False)


def measure(case: Case, pairs: int) -> dict[str, Any]:
    """Return seconds of all ranks over the seconds of rank 0, measured in turn, and flops and bytes sent by rank 0."""
    sent = SentBytes()
    with sent:
        case.by_all()
    rank_flops = flops(case.by_all)
    first = dist.get_rank() == 0
    flops_alone = flops(case.by_rank0) if first else 0
    times: list[tuple[float, float]] = []
    for _ in range(pairs):
        gc.collect()
        dist.barrier()
        rank0 = seconds(case.by_rank0) if first else 0.0
        dist.barrier()
        times.append((rank0, seconds(lambda: (case.by_all(), dist.barrier()))))
    ratios = [all_ranks / rank0 for rank0, all_ranks in times] if first else [0.0]
    return {
        "title": case.title,
        "ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        "seconds_alone": statistics.median(rank0 for rank0, _ in times),
        "flops": {"alone": flops_alone, "a_rank": rank_flops},
        "sent_bytes": sent.bytes,
        "sent_calls": sent.calls,
    }


def memory(p: Problem, mesh: DeviceMesh) -> dict[str, int]:
    """Return the peak memory of a rank beside its shard of the training state."""
    u, e = (_local_rows(batch, mesh) for batch in (p.u, p.e))
    work = _fully_sharded(p, mesh, u, e)
    dist.barrier()
    return {"peak_extra_bytes": peak_extra(work)}


def rank_main(out: str, setting: Setting, pairs: int) -> None:
    """Measure on one rank; rank 0 writes the figures.

    Args:
        out: file of the figures, JSON.
        setting: size of the problem.
        pairs: paired runs; 0 measures the memory of the sharded model instead.
    """
    one_thread()
    ranks = int(os.environ["WORLD_SIZE"])
    device = "cuda" if torch.cuda.device_count() >= ranks else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(device, (ranks,))
    try:
        p = _to(problem(setting), device)
        figures = [measure(case, pairs) for case in cases(p, mesh)] if pairs else memory(p, mesh)
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(figures))
    finally:
        dist.destroy_process_group()


def _to(p: Problem, device: str) -> Problem:
    model: Any = p.model.to(device)
    apply, params = fx.make_functional(model)

    def to_device(tree: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.to(device) for name, x in tree.items()}

    state = p.state._replace(exp_avg=to_device(p.state.exp_avg), exp_avg_sq=to_device(p.state.exp_avg_sq))
    u, e = (Batch._make(None if x is None else x.to(device) for x in batch) for batch in (p.u, p.e))
    return Problem(model, apply, params, state, u, e, to_device(p.gradient), to_device(p.gain))
