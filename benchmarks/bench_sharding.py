"""What several ranks cost and save: seconds beside one rank, bytes that they send, and what that makes of big models.

    python -m benchmarks sharding             writes results/sharding.json and the README's tables; ten minutes
    python -m benchmarks sharding --quick     a tiny model, written nowhere: it only shows that this works

Every rank has one thread, on a GPU of its own where there are several (NCCL), else on the CPU (gloo). The last table is
computed, from the rates and bytes measured here and assumptions about GPUs that stand beside it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
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
from benchmarks.harness import (
    GIVEN_BACK,
    PAIRS,
    README,
    ROOT,
    Work,
    flops,
    one_thread,
    peak_extra,
    peak_extra_bytes,
    print_peak_extra,
    seconds,
    store,
)
from benchmarks.problems import Problem, Setting, problem
from fx_influence.batching.microbatch import TOKENS_PER_CHUNK
from fx_influence.batching.rows import select_rows
from fx_influence.estimators.stderr import MAX_RANDOM_GROUPS
from fx_influence.interop.runtime.environment import environment
from fx_influence.types import Batch

NAME = "bench_sharding"
RANKS = 2
DIRECTIONS = 4


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank hands to collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = func._schema.name.removeprefix("c10d::").strip("_")
            given = args[0] if kind == "allreduce" else args[1]
            self.bytes[kind] = self.bytes.get(kind, 0) + sum(x.nbytes for x in _tensors(given))
            self.calls[kind] = self.calls.get(kind, 0) + 1
        return func(*args, **(kwargs or {}))


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (list, tuple)):
        for one in given:
            yield from _tensors(one)


class Case(NamedTuple):
    """The same work by rank 0 with all rows and by all ranks, each with its own."""

    title: str
    alone: Work
    together: Work


def cases(p: Problem, mesh: DeviceMesh) -> list[Case]:
    """Of the adjoint without and with error bars, the matrix, and finite steps; and of a sharded model."""
    u, e = (_own(batch, mesh) for batch in (p.u, p.e))
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


def _own(batch: Batch, mesh: DeviceMesh) -> Batch:
    each = -(-len(batch.input_ids) // mesh.size())
    return select_rows(batch, slice(dist.get_rank() * each, (dist.get_rank() + 1) * each))


def _fully_sharded(p: Problem, mesh: DeviceMesh, u: Batch, e: Batch) -> Work:
    model: Any = copy.deepcopy(p.model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    apply, params = fx.make_functional(fully_shard(model, mesh=mesh))

    def like(tree: dict[str, Tensor]) -> dict[str, Tensor]:
        shardings: dict[str, Any] = params
        return {name: distribute_tensor(x, mesh, shardings[name].placements) for name, x in tree.items()}

    state = p.state._replace(exp_avg=like(p.state.exp_avg), exp_avg_sq=like(p.state.exp_avg_sq))
    return lambda: fx.influence(params, u, e, state, apply=apply, stderr=False)


def measure(case: Case, pairs: int) -> dict[str, Any]:
    """Seconds of all ranks over those of rank 0 alone, in turn; bytes that rank 0 sends and flops that it makes."""
    sent = Sent()
    with sent:
        case.together()
    together = flops(case.together)
    first = dist.get_rank() == 0
    alone = flops(case.alone) if first else 0
    found: list[tuple[float, float]] = []
    for _ in range(pairs):
        gc.collect()
        dist.barrier()
        by_one = seconds(case.alone) if first else 0.0
        dist.barrier()
        found.append((by_one, seconds(lambda: (case.together(), dist.barrier()))))
    ratios = [all_ranks / by_one for by_one, all_ranks in found] if first else [0.0]
    return {
        "title": case.title,
        "ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        "seconds_alone": statistics.median(by_one for by_one, _ in found),
        "flops": {"alone": alone, "a_rank": together},
        "sent_bytes": sent.bytes,
        "sent_calls": sent.calls,
    }


def memory(p: Problem, mesh: DeviceMesh) -> dict[str, int]:
    """What a rank holds of a training state that is sharded, and its peak beside that."""
    u, e = (_own(batch, mesh) for batch in (p.u, p.e))
    work = _fully_sharded(p, mesh, u, e)
    dist.barrier()
    return {"peak_extra_bytes": peak_extra(work)}


def rank_main(out: str, setting: Setting, pairs: int) -> None:
    """Of one rank; rank 0 writes what was found. Without pairs, what the sharded model takes in memory."""
    one_thread()
    ranks = int(os.environ["WORLD_SIZE"])
    device = "cuda" if torch.cuda.device_count() >= ranks else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(device, (ranks,))
    try:
        p = _on(problem(setting), device)
        found = [measure(case, pairs) for case in cases(p, mesh)] if pairs else memory(p, mesh)
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def _on(p: Problem, device: str) -> Problem:
    model: Any = p.model.to(device)
    apply, params = fx.make_functional(model)

    def moved(tree: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.to(device) for name, x in tree.items()}

    state = p.state._replace(exp_avg=moved(p.state.exp_avg), exp_avg_sq=moved(p.state.exp_avg_sq))
    u, e = (Batch._make(None if x is None else x.to(device) for x in batch) for batch in (p.u, p.e))
    return Problem(model, apply, params, state, u, e, moved(p.gradient), moved(p.gain))


def launched(setting: Setting, pairs: int) -> Any:
    """What ``rank_main`` found on ``RANKS`` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "found.json")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        ranks = ["-m", "benchmarks.bench_sharding", "--rank", out, json.dumps(setting), str(pairs)]
        # What is given back at once is asked for again, which takes time.
        variables = os.environ if pairs else GIVEN_BACK
        subprocess.run([*launcher, *ranks], cwd=ROOT, check=True, env={**variables, "OMP_NUM_THREADS": "1"})
        return json.loads(Path(out).read_text())


def sent_by_formula(p: Problem) -> dict[str, int]:
    """Bytes of parameters' size that a rank hands to collectives, float32; what belongs to rows and tokens is left out.

    Whole: the gradient of E (or of each union of its clusters) and that of U, to all-reduces. Sharded: a shard of
    every unit for a forward, a backward and, with that of the direction, a JVP, over each part of its rows; the unit's
    gradient whole; and once for all parts the same of what is in no unit.
    """
    gradient = 4 * sum(x.numel() for x in p.params.values())
    units = 4 * sum(x.numel() for name, x in p.params.items() if ".layers." in name)
    width = p.u.input_ids.shape[1]
    parts = -(-len(p.u.input_ids) // RANKS // max(1, TOKENS_PER_CHUNK // width))
    # E goes forward once more where its part is not the first, whose graph is kept until all of E is scored.
    gathers = (2 * parts + parts - 1) + 2 * parts + 2 * parts
    clusters = len(p.e.input_ids) // 2
    return {
        "adjoint": 2 * gradient,
        "adjoint, error bars": (min(MAX_RANDOM_GROUPS, clusters) + 1) * gradient,
        "matrix": 2 * gradient,
        "adjoint, FSDP2": gathers * units // RANKS + 2 * parts * units + (4 // RANKS + 2) * (gradient - units),
    }


class Assumed(NamedTuple):
    """Of GPUs that are not here: rates a second, and bytes."""

    matmul_flops: float = 600e12
    link_in_node: float = 300e9
    link_between_nodes: float = 40e9
    memory: float = 80e9
    in_node: int = 8
    rollouts: int = 512
    tokens: int = 1024
    tokens_at_once: int = 16_384


MODELS = {"1.5B": 1.5e9, "7B": 7e9, "70B": 70e9}
GPUS = (1, 8, 64)


def computed(reached: float, bytes_a_parameter: float, assumed: Assumed) -> list[dict[str, Any]]:
    """Seconds of an adjoint without error bars, U and E alike, for whole models on every GPU or, where that is too big,
    sharded over all of them; None where it is too big even so.

    ``reached``: the share of the matmul rate. ``bytes_a_parameter``: what a rank holds at its peak.
    """
    found = []
    for (name, parameters), gpus in itertools.product(MODELS.items(), GPUS):
        tokens = assumed.rollouts * assumed.tokens
        # Nine forwards, of two operations a parameter and token each.
        work = 18 * parameters * tokens / gpus / (assumed.matmul_flops * reached)
        link = assumed.link_in_node if gpus <= assumed.in_node else assumed.link_between_nodes
        whole, part = bytes_a_parameter * parameters, bytes_a_parameter * parameters / gpus
        passes = -(-tokens // gpus // assumed.tokens_at_once)
        # Weights in bfloat16: forward and backward over E and over U, and with the direction's in the JVP; twice the
        # gradient in float32.
        by_shards = passes * (6 * 2 + 2 * 4) * parameters
        in_all = 2 * 2 * 4 * parameters
        how = "whole" if whole < assumed.memory else "sharded" if part < assumed.memory else None
        sent = {"whole": in_all, "sharded": by_shards, None: 0.0}[how] * (gpus - 1) / gpus
        found.append(
            {
                "model": name,
                "gpus": gpus,
                "how": how,
                "gigabytes_a_gpu": (part if how != "whole" else whole) / 1e9,
                "seconds": None if how is None else work + sent / link,
                "seconds_sending": None if how is None else sent / link,
            }
        )
    return found


def matmul_rate(side: int = 2048) -> float:
    """Operations a second of a product of square matrices in float32."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    return statistics.median(2 * side**3 / seconds(lambda: a @ b) for _ in range(PAIRS))


def report(setting: Setting, memory_setting: Setting, pairs: int) -> dict[str, Any]:
    """All figures."""
    found = launched(setting, pairs)
    whole = problem(memory_setting)
    parameters = sum(x.numel() for x in whole.params.values())
    alone = peak_extra_bytes(NAME, json.dumps(memory_setting))
    sharded = launched(memory_setting, 0)["peak_extra_bytes"]
    adjoint = found[0]
    reached = adjoint["flops"]["alone"] / adjoint["seconds_alone"] / matmul_rate()
    # The state: weights in bfloat16 or float32, and two moments.
    a_parameter = alone / parameters + 12
    assumed = Assumed()
    return {
        "environment": environment(),
        "ranks": RANKS,
        "pairs": pairs,
        "title": setting.title,
        "cases": found,
        "by_formula": sent_by_formula(problem(setting)),
        "memory": {
            "title": memory_setting.title,
            "parameters_bytes": 4 * parameters,
            "peak_extra_bytes_alone": alone,
            "peak_extra_bytes_a_rank_sharded": sharded,
        },
        "computed": {
            "share_of_matmul_rate": reached,
            "bytes_a_parameter": a_parameter,
            "assumed": assumed._asdict(),
            "table": computed(reached, a_parameter, assumed),
        },
    }


def markdown(figures: dict[str, Any]) -> str:
    """The README's tables."""
    lines = [
        f"| {figures['title']}, {figures['ranks']} ranks | seconds / one rank's | flops of a rank / one rank's "
        "| MB sent by a rank | by formula, without rows' and tokens' |",
        "|---|---|---|---|---|",
    ]
    for case in figures["cases"]:
        formula = figures["by_formula"].get(case["title"])
        lines.append(
            f"| {case['title']} | {case['ratio']['median']:.2f} ({case['ratio']['lowest']:.2f} to "
            f"{case['ratio']['highest']:.2f}) | {case['flops']['a_rank'] / case['flops']['alone']:.2f} "
            f"| {sum(case['sent_bytes'].values()) / 1e6:.2f} | {'' if formula is None else f'{formula / 1e6:.2f}'} |"
        )
    m, c = figures["memory"], figures["computed"]
    lines += [
        "",
        f"Memory of {m['title']}, {m['parameters_bytes'] / 1e6:.0f} MB of weights: an adjoint takes "
        f"{m['peak_extra_bytes_alone'] / 1e6:.0f} MB beside its inputs in one process, "
        f"{m['peak_extra_bytes_a_rank_sharded'] / 1e6:.0f} MB on each of {figures['ranks']} ranks that share them.",
        "",
        "**Computed, not measured**: seconds (of which sending) of an adjoint over U and E of "
        f"{c['assumed']['rollouts']} x {c['assumed']['tokens']} tokens each, from the {c['share_of_matmul_rate']:.0%} "
        f"of the matmul rate that it reaches here and {c['bytes_a_parameter']:.0f} bytes a parameter at its peak, on "
        f"GPUs assumed to multiply at {c['assumed']['matmul_flops'] / 1e12:.0f} TFLOP/s, with "
        f"{c['assumed']['memory'] / 1e9:.0f} GB each, links of {c['assumed']['link_in_node'] / 1e9:.0f} GB/s among "
        f"{c['assumed']['in_node']} and {c['assumed']['link_between_nodes'] / 1e9:.0f} GB/s beyond, "
        f"{c['assumed']['tokens_at_once']} tokens a pass, "
        "nothing overlapped:",
        "",
        "| | " + " | ".join(f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in GPUS) + " |",
        "|---|" + "---|" * len(GPUS),
    ]
    for model in MODELS:
        row = [entry for entry in c["table"] if entry["model"] == model]
        lines.append(f"| {model} | " + " | ".join(_cell(entry) for entry in row) + " |")
    return "\n".join(lines)


def _cell(entry: dict[str, Any]) -> str:
    size = f"{entry['gigabytes_a_gpu']:.0f} GB a GPU"
    if entry["how"] is None:
        return f"does not fit: {size}"
    return f"{entry['seconds']:.1f} s ({entry['seconds_sending']:.1f}), {entry['how']}, {size}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, written nowhere")
    parser.add_argument("--rank", nargs=3, metavar=("OUT", "SETTING", "PAIRS"), help=argparse.SUPPRESS)
    parser.add_argument("--memory", metavar="SETTING", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    one_thread()
    if arguments.rank:
        out, setting, pairs = arguments.rank
        rank_main(out, Setting(*json.loads(setting)), int(pairs))
        # The threads of FSDP's group outlive it, and one that sees the interpreter end can abort the process.
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
        store(NAME, figures, {README: markdown(figures)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
