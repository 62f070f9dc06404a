"""Run on each rank: ``fx.lab.run_fisher`` in the caller's process group, first measured, then read back."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import fx_influence as fx
from fx_influence.lab.plan import FisherKernelPlan, read_plan
from helpers.ranks import end_rank, global_mesh, save_result


def main(folder: str) -> None:
    plan = read_plan(Path(folder) / "plan.yaml", FisherKernelPlan)
    results = []
    with global_mesh():
        for _ in range(2):
            path = Path(folder) / "out" if dist.get_rank() == 0 else "/dev/null/nowhere"
            evaluation = fx.lab.run_fisher(plan, path).evaluations[0]
            arrays = {**evaluation.arrays, "kernel": evaluation.kernel, "matrix": evaluation.delta_logprob_matrix}
            results.append({name: torch.from_numpy(x) for name, x in arrays.items()})
        save_result(folder, results)


if __name__ == "__main__":
    main(sys.argv[1])
    end_rank()
