"""Run on each rank of tests/distributed/test_engine.py: ``sharded_cases`` from this rank's rows, and its errors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fx_influence as fx
from helpers.partitioned_states import partitioned_state
from helpers.ranks import end_rank, global_mesh, save_result
from helpers.sharded_cases import (
    compute_all,
    qwen_case,
    rows_of_rank,
    shared_prompt_case,
    single_loss_case,
    tiny_case,
)

COUNTS = {2: ([7, 0], [4, 7]), 3: ([2, 0, 5], [1, 8, 2]), 4: ([1, 2, 4, 0], [3, 0, 4, 4])}
"""Rows of the update and of the evaluation batch, by rank."""


def local_case(state: dict[str, Any], counts: tuple[list[int], list[int]], rank: int) -> dict[str, Any]:
    return {
        **state,
        **{f: rows_of_rank(state[f], c, rank) for f, c in zip(("batch_u", "batch_e"), counts, strict=True)},
    }


def partitioned_case() -> dict[str, Any]:
    """Return ``tiny_case`` with an optimizer's state that is partitioned over all ranks."""
    state, every_rank = tiny_case(), init_device_mesh("cpu", (dist.get_world_size(),))
    return {**state, "opt_state": partitioned_state(state["opt_state"], state["params"], every_rank)}


def refusals(mesh: DeviceMesh, rank: int) -> dict[str, str]:
    """Return the error that every rank raises after a mistake of the last rank only."""
    state, is_wrong = tiny_case(), rank == mesh.size() - 1

    def influence(**changes: Any) -> None:
        fx.influence(**{**state, **(changes if is_wrong else {})}, mesh=mesh)

    single_rank = dist.new_subgroups(group_size=1)[0]

    def summed_activations(params: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # A tensor-parallel layer calls it; over one rank it leaves the values as they are.
        return all_reduce(state["apply"](params, ids, mask), "sum", single_rank)

    def lost_tangent() -> None:
        fx.influence(**{**state, "apply": summed_activations}, mesh=mesh, stderr=False)

    perturbed = {**state["params"], "head.bias": state["params"]["head.bias"] + 1e-9}
    e = state["batch_e"]
    calls: dict[str, Callable[[], object]] = {
        "temperature": lambda: influence(temperature=0.9),
        "parameters": lambda: influence(params=perturbed),
        "steps": lambda: influence(opt_state=state["opt_state"]._replace(step=dict.fromkeys(state["params"], 1))),
        "shapes": lambda: influence(batch_e=e._replace(completion_mask=e.completion_mask[:, 1:])),
        "fields": lambda: influence(batch_e=e._replace(group=None)),
        "direction": lambda: fx.snis_delta(
            state["params"],
            {"absent" if is_wrong else "head.bias": perturbed["head.bias"]},
            0.1,
            e,
            apply=state["apply"],
            mesh=mesh,
        ),
        "nothing": lambda: influence(),
        "lost tangent": lost_tangent,
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
            messages[name] = "no error"
        except (ValueError, fx.IdentityError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def main(out: str, *shape: str) -> None:
    with global_mesh(*map(int, shape)) as mesh:
        rank = dist.get_rank()
        counts = COUNTS[mesh.size()]
        results: dict[str, Any] = {"tiny": compute_all(local_case(tiny_case(), counts, rank), mesh)}
        results["partitioned"] = compute_all(local_case(partitioned_case(), counts, rank), mesh)
        if mesh.size() == 2:
            results["single loss"] = compute_all(local_case(single_loss_case(), ([3, 4], [7, 4]), rank), mesh)
            results["prompts"] = compute_all(local_case(shared_prompt_case(), ([3, 5], [7, 5]), rank), mesh)
            results["qwen"] = compute_all(local_case(qwen_case(), ([3, 6], [5, 5]), rank), mesh)
            results["refusals"] = refusals(mesh, rank)
        save_result(out, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_rank()
