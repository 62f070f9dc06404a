"""A training loop on several ranks, replicated by DDP or sharded by FSDP2, measured by ``fx.attach``."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fx_influence as fx
from helpers.loops import (
    COUNT,
    MAX_NORM,
    Loop,
    batch_of,
    closed_form,
    completion_values,
    grpo_loss,
    named,
    sample_rollouts,
)
from helpers.ranks import end_rank, global_mesh, save_result


def expected_influence(loop: Loop, rollouts: Any) -> fx.Influence:
    """Return the first step's influences by one process with the rollouts of all."""
    apply, params = fx.make_functional(loop.model)
    with torch.no_grad():
        coefficients = closed_form(rollouts, completion_values(loop.model, rollouts)[0])
    batch, state = batch_of(rollouts, coefficients), fx.adamw_state(loop.optimizer, loop.model)
    return fx.influence(params, batch, None, state, apply=apply, max_grad_norm=MAX_NORM)


def measured(kind: str, mesh: Any) -> dict[str, Any]:
    loop = Loop()
    rollouts = sample_rollouts(loop.model, 0)
    expected = expected_influence(loop, rollouts)
    model: Any = loop.model
    if kind.startswith("fsdp2"):
        fully_shard(model, mesh=mesh)
    elif kind == "ddp":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    results: list[fx.Influence] = []
    capture = fx.attach(optimizer, model, every=1, on_step=lambda _, out: results.append(out))
    size = COUNT // mesh.size()
    rank = dist.get_rank()
    end = (rank + 1) * size if rank + 1 < mesh.size() else COUNT
    # Gradients of all but the last micro-batch stay unsharded and unreduced.
    starts = [rank * size, rank * size + 3] if kind == "fsdp2 without synchronisation" else [rank * size]
    for start, stop in zip(starts, [*starts[1:], end], strict=True):
        if len(starts) > 1:
            model.set_requires_gradient_sync(stop == end)
        part = rollouts.part(slice(start, stop))
        logprobs, _ = completion_values(model, part)
        capture.add(**named(part, logprobs))
        # Data parallelism takes the mean of the ranks' losses.
        (mesh.size() * grpo_loss(logprobs, part)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    names = ("per_sequence", "per_token", "total", "stderr")
    return {
        "history": capture.history,
        "actual": {name: getattr(results[0], name) for name in names} if results else {},
        "expected": {name: getattr(expected, name) for name in names},
    }


if __name__ == "__main__":
    with global_mesh() as mesh:
        save_result(sys.argv[1], measured(sys.argv[2], mesh))
    end_rank()
