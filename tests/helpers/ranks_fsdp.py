"""Run on each rank of tests/distributed/test_engine.py: influences of FSDP2 models from this rank's rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import fx_influence as fx
from helpers.ranks import end_rank, global_mesh, save_result
from helpers.sharded_cases import Results, compute_mesh_functions, rows_of_rank, sharded_batches, sharded_opt_state
from helpers.sharded_models import CASES, distribute_like, distribute_state, shard_model

COUNTS = {2: ([9, 0], [4, 6]), 3: ([2, 3, 4], [1, 9, 0])}
"""Rows of the update and of the evaluation batch, by rank."""


def influences(kind: str, mesh: DeviceMesh) -> Results:
    make, how = CASES[kind]
    state = sharded_opt_state(fx.make_functional(make())[1])
    apply, params = fx.make_functional(shard_model(make(), how, mesh))
    u, e = (
        rows_of_rank(batch, counts, dist.get_rank())
        for batch, counts in zip(sharded_batches(), COUNTS[mesh.size()], strict=True)
    )
    return compute_mesh_functions(params, u, e, distribute_state(state, params), apply, distribute_like)


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    make, how = CASES["tiny float64"]
    apply, params = fx.make_functional(shard_model(make(), how, mesh))
    plain = sharded_opt_state(fx.make_functional(make())[1])
    u, e = sharded_batches()
    calls: dict[str, Callable[[], object]] = {
        "matrix": lambda: fx.influence(params, u, e, plain, apply=apply, matrix=True),
        "kernel": lambda: fx.fisher_kernel(params, u, e, None, apply=apply, preconditioner="identity"),
        "state": lambda: fx.influence(params, u, e, plain, apply=apply),
        "mesh": lambda: fx.influence(params, u, e, plain, apply=apply, mesh=DeviceMesh("cpu", [dist.get_rank()])),
    }
    messages = {}
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"\S") as raised:
            call()
        messages[name] = str(raised.value)
    return messages


def main(out: str, *kinds: str) -> None:
    with global_mesh() as mesh:
        results: dict[str, Any] = {kind: influences(kind, mesh) for kind in kinds}
        save_result(out, {**results, "refusals": refusals(mesh)})


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_rank()
