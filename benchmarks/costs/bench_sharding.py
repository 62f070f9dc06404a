"""Measure several ranks beside one: seconds, bytes sent and memory.

    python -m benchmarks sharding             writes results/sharding.json and the table in README.md; ten minutes
    python -m benchmarks sharding --quick     a tiny model, written nowhere, to check that it works

Every rank has one thread, on a separate GPU if there are several (NCCL), else on the CPU (gloo). The share of the rate
of matrix products is what ``bench_large_models`` computes seconds of large models from.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import fx_influence as fx
from benchmarks.costs.problems import Problem, Setting, problem
from benchmarks.costs.sharding_ranks import rank_main
from benchmarks.harness import (
    COSTS,
    PAIRS,
    RETURN_FREED_MEMORY,
    ROOT,
    one_thread,
    parser,
    peak_extra_bytes,
    print_peak_extra,
    seconds,
    store,
)
from fx_influence.batching.microbatch import TOKENS_PER_CHUNK
from fx_influence.estimators.stderr import MAX_RANDOM_GROUPS
from fx_influence.interop.runtime.environment import environment

NAME, MODULE = "bench_sharding", "benchmarks.costs.bench_sharding"
RANKS = 2


def launch(setting: Setting, pairs: int) -> Any:
    """Return the figures of ``rank_main`` on ``RANKS`` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "figures.json")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        ranks = ["-m", MODULE, "--rank", out, json.dumps(setting), str(pairs)]
        # Returning freed memory at once takes time, so only the memory is measured with it.
        variables = os.environ if pairs else RETURN_FREED_MEMORY
        subprocess.run([*launcher, *ranks], cwd=ROOT, check=True, env={**variables, "OMP_NUM_THREADS": "1"})
        return json.loads(Path(out).read_text())


def sent_by_formula(p: Problem) -> dict[str, int]:
    """Return the float32 bytes of parameters and gradients that a rank passes to collectives, without rows and tokens.

    Replicated parameters are all-reduced: the gradient over U, and over E or each random group of its clusters.
    Of sharded parameters, every pass over a micro-batch gathers the shards of each FSDP unit (the JVP those of the
    direction too), and every backward reduces the unit's full gradient; those of the root are sent once in total.
    """
    gradient = 4 * sum(x.numel() for x in p.params.values())
    units = 4 * sum(x.numel() for name, x in p.params.items() if ".layers." in name)
    width = p.u.input_ids.shape[1]
    micro_batches = -(-len(p.u.input_ids) // RANKS // max(1, TOKENS_PER_CHUNK // width))
    # E's micro-batches are recomputed, but for the first, whose graph is kept until all of E is scored.
    gathers = (2 * micro_batches + micro_batches - 1) + 2 * micro_batches + 2 * micro_batches
    clusters = len(p.e.input_ids) // 2
    return {
        "adjoint": 2 * gradient,
        "adjoint, error bars": (min(MAX_RANDOM_GROUPS, clusters) + 1) * gradient,
        "matrix": 2 * gradient,
        "adjoint, FSDP2": gathers * units // RANKS + 2 * micro_batches * units + (4 // RANKS + 2) * (gradient - units),
    }


def matmul_rate(repeats: int, side: int = 2048) -> float:
    """Return operations per second of a product of square matrices in float32, the median of ``repeats``."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    return statistics.median(2 * side**3 / seconds(lambda: a @ b) for _ in range(repeats))


def report(setting: Setting, memory_setting: Setting, pairs: int) -> dict[str, Any]:
    """Return all figures.

    Args:
        setting: problem on which seconds and bytes are measured.
        memory_setting: problem on which memory is measured.
        pairs: paired runs.
    """
    cases = launch(setting, pairs)
    model = problem(memory_setting)
    parameters = sum(x.numel() for x in model.params.values())
    alone = peak_extra_bytes(MODULE, json.dumps(memory_setting))
    sharded = launch(memory_setting, 0)["peak_extra_bytes"]
    adjoint = cases[0]
    matmul_share = adjoint["flops"]["alone"] / adjoint["seconds_alone"] / matmul_rate(pairs)
    return {
        "environment": environment(),
        "ranks": RANKS,
        "pairs": pairs,
        "title": setting.title,
        "cases": cases,
        "by_formula": sent_by_formula(problem(setting)),
        "memory": {
            "title": memory_setting.title,
            "parameters_bytes": 4 * parameters,
            "peak_extra_bytes_alone": alone,
            "peak_extra_bytes_a_rank_sharded": sharded,
        },
        "share_of_matmul_rate": matmul_share,
    }


def markdown(figures: dict[str, Any]) -> str:
    """Return the tables of the page."""
    lines = [
        f"| {figures['title']}, {figures['ranks']} ranks | seconds / one rank's | flops of a rank / one rank's "
        "| MB sent by a rank | by formula, parameters only |",
        "|---|---|---|---|---|",
    ]
    for case in figures["cases"]:
        formula = figures["by_formula"].get(case["title"])
        lines.append(
            f"| {case['title']} | {case['ratio']['median']:.2f} ({case['ratio']['lowest']:.2f} to "
            f"{case['ratio']['highest']:.2f}) | {case['flops']['a_rank'] / case['flops']['alone']:.2f} "
            f"| {sum(case['sent_bytes'].values()) / 1e6:.2f} | {'' if formula is None else f'{formula / 1e6:.2f}'} |"
        )
    m = figures["memory"]
    lines += [
        "",
        f"Memory of {m['title']}, {m['parameters_bytes'] / 1e6:.0f} MB of weights: an adjoint takes "
        f"{m['peak_extra_bytes_alone'] / 1e6:.0f} MB beside its inputs in one process, "
        f"{m['peak_extra_bytes_a_rank_sharded'] / 1e6:.0f} MB on each of {figures['ranks']} ranks if sharded.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    command = parser(__doc__)
    command.add_argument("--rank", nargs=3, metavar=("OUT", "SETTING", "PAIRS"), help=argparse.SUPPRESS)
    command.add_argument("--memory", metavar="SETTING", help=argparse.SUPPRESS)
    arguments = command.parse_args(argv)
    one_thread()
    if arguments.rank:
        out, setting, pairs = arguments.rank
        rank_main(out, Setting(*json.loads(setting)), int(pairs))
        # Threads of FSDP's process group outlive it, and can abort the process when the interpreter ends.
        os._exit(0)
    if arguments.memory:
        p = problem(Setting(*json.loads(arguments.memory)))
        print_peak_extra(lambda: fx.influence(p.params, p.u, p.e, p.state, apply=p.apply, stderr=False))
        return 0
    if arguments.quick:
        figures = report(Setting("tiny", rows=4, width=24), Setting("tiny", rows=4, width=24), pairs=1)
    else:
        figures = report(Setting("3M", rows=32), Setting("24M", rows=4, width=32), PAIRS)
    print(markdown(figures))
    if not arguments.quick:
        store(NAME, figures, {COSTS: {NAME: markdown(figures)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
