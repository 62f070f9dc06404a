"""Attribute a step of 0.5B parameters (Qwen2-0.5B's shape, random weights) beside its training state on this machine.

    python -m benchmarks half_billion            writes results/half_billion.json and the table in README.md; minutes
    python -m benchmarks half_billion --quick    a tiny model, written nowhere

The process holds what a training run in float32 holds, weights, gradient and both moments: 8 GB if all parameters are
trained. It measures the seconds of one ``fx.influence`` that is passed the gradient, and the peak of resident memory
above that state, each in a fresh process. Peaks include the activations of the passes and 1 GiB of caches.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, NamedTuple

import fx_influence as fx
from benchmarks.gpu.cases import Case, Setting
from benchmarks.gpu.problems import problem, task
from benchmarks.harness import (
    COSTS,
    figures_of_process,
    one_thread,
    parser,
    peak_bytes,
    reset_peak,
    result_path,
    store,
    write_json,
)
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.interop.runtime.environment import environment

NAME = "bench_half_billion"
MEMORY_NEEDED = 15e9
"""Free bytes without which the benchmark would end in the machine's out-of-memory killer."""

BUDGET = 2**30
"""``memory_budget`` of the calls, in bytes."""


class Attribution(NamedTuple):
    """A call of ``fx.influence``: the model, which weights are trained, with or without error bars, and E's size.

    ``own_rollouts``: whether E is U, each row without its own prompt.
    """

    model: str
    lora: bool
    stderr: bool
    rows: int = 8
    width: int = 96
    own_rollouts: bool = False

    @property
    def name(self) -> str:
        evaluation = ", on U itself" if self.own_rollouts else ""
        return f"{'LoRA' if self.lora else 'full'}{', error bars' if self.stderr else ''}{evaluation}"


ATTRIBUTIONS = tuple(
    Attribution("0.5B", lora, stderr, own_rollouts=own_rollouts)
    for lora in (False, True)
    for stderr, own_rollouts in ((False, False), (True, False), (True, True))
)
QUICK = tuple(case._replace(model="tiny", width=24) for case in ATTRIBUTIONS if case.lora == case.stderr)


def measure(case: Attribution) -> dict[str, Any]:
    """Return seconds, bytes and checks of one attribution, in this process."""
    one_thread()
    setting = Setting(case.model, case.lora, "float32")
    prepared = problem(setting, "cpu")
    batches = task(Case(setting, "adjoint", case.rows, case.rows, case.width), prepared, "cpu")
    apply, params, state = prepared.apply, prepared.params, prepared.state
    grad = batch_gradient(params, batches.u, apply)
    before = reset_peak()
    start = time.perf_counter(), time.process_time()
    batch_e = None if case.own_rollouts else batches.e
    options: dict[str, Any] = {"max_grad_norm": 1.0, "stderr": case.stderr, "memory_budget": BUDGET}
    out = fx.influence(params, batches.u, batch_e, state, apply=apply, grad=grad, **options)
    elapsed = time.perf_counter() - start[0], time.process_time() - start[1]
    absolute = float(out.per_sequence.abs().sum())
    return {
        "trainable": sum(p.numel() for p in params.values()),
        "state_bytes": before,
        "peak_bytes": peak_bytes(),
        "seconds": elapsed[0],
        "processor_seconds": elapsed[1],
        "residual": abs(float(out.residual)) / absolute,
        "rounding": float(out.rounding.nansum()) / absolute,
    }


def measure_in_fresh_process(case: Attribution) -> dict[str, Any]:
    """Return ``measure(case)`` of a fresh process."""
    figures = figures_of_process("benchmarks.real.bench_half_billion", "--case", json.dumps(case))
    return {**case._asdict(), "name": case.name, **figures}


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the page."""
    lines = [
        "| trained | parameters | training state, GB | peak, GB | bytes above it for each trained parameter "
        "| processor seconds | residual, rounding over Σ\\|δ\\| |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["attributions"]:
        extra = (row["peak_bytes"] - row["state_bytes"]) / row["trainable"]
        lines.append(
            f"| {row['name']} | {row['trainable'] / 1e6:,.1f}M | {row['state_bytes'] / 1e9:.2f} "
            f"| {row['peak_bytes'] / 1e9:.2f} | {extra:,.1f} | {row['processor_seconds']:.0f} "
            f"| {row['residual']:.1e}, {row['rounding']:.1e} |"
        )
    return "\n".join(lines)


def available_bytes() -> int:
    """Return the memory that the machine can give without swapping."""
    with open("/proc/meminfo", encoding="utf-8") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def main(argv: list[str] | None = None) -> int:
    command = parser(__doc__, "a tiny model, written nowhere")
    command.add_argument("--case", help=argparse.SUPPRESS)
    arguments = command.parse_args(argv)
    if arguments.case:
        print(json.dumps(measure(Attribution(*json.loads(arguments.case)))))
        return 0
    report: dict[str, Any] = {"environment": environment(), "attributions": []}
    if arguments.quick:
        report["attributions"] = [measure_in_fresh_process(case) for case in QUICK]
        print(markdown(report))
        return 0
    for case in ATTRIBUTIONS:
        if not case.lora and available_bytes() < MEMORY_NEEDED:
            free = f"{available_bytes() / 1e9:.0f} GB"
            needed = f"{MEMORY_NEEDED / 1e9:.0f} GB for {case.name}"
            print(f"free memory is {free}; expected {needed}. Run it when there is more", file=sys.stderr)
            return 1
        report["attributions"].append(measure_in_fresh_process(case))
        write_json(result_path(NAME), report)
        print(markdown(report).splitlines()[-1], flush=True)
    store(NAME, report, {COSTS: {NAME: markdown(report)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
