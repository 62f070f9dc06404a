"""Run the cases of the GPU benchmark within a time limit, and report them."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cases import COMPILE_SECONDS, FLOOR_SECONDS, MEMORY_BUDGET, SAFETY, TOKENS_AT_ONCE, Case
from benchmarks.gpu.measure import attempt, collect, compute_dtype, matmul_rate, measure
from benchmarks.gpu.operations import operations
from benchmarks.gpu.problems import Problem, problem
from benchmarks.harness import write_json
from fx_influence.interop.runtime.environment import environment


def run(cases: Sequence[Case], device: str, minutes: float, out: Path | None) -> list[dict[str, Any]]:
    """Measure every case, print a line for each, and write the report so far to ``out``.

    Args:
        cases: by importance.
        device: ``cuda`` or ``cpu``.
        minutes: time after which no case is running.
        out: file of the report; None: it is not written.

    Returns:
        An outcome for each case: measured, skipped or failed.
    """
    end = time.monotonic() + 60 * minutes
    rates = {dtype: matmul_rate(dtype, device) for dtype in ("bfloat16", "float32")}
    print(", ".join(f"{dtype} matmul {rate / 1e12:.4g} TFLOP/s" for dtype, rate in rates.items()), flush=True)
    outcomes: list[dict[str, Any]] = []
    for _, group in itertools.groupby(cases, key=lambda case: case.setting):
        for outcome in _outcomes(list(group), device, rates, end):
            outcomes = beside_step([*outcomes, outcome])
            print(line(outcomes[-1]), flush=True)
            if out is not None:
                write_json(out, report(device, rates, minutes, outcomes))
        collect(device)
    return outcomes


def _outcomes(cases: Sequence[Case], device: str, rates: dict[str, float], end: float) -> Iterator[dict[str, Any]]:
    """Yield the outcomes of cases of one setting, whose model exists from the first begun case to the last."""
    prepared: list[Problem] = []

    def begin(case: Case) -> dict[str, Any]:
        if not prepared:
            prepared.append(problem(case.setting, device))
        return measure(case, prepared[0], device, rates[compute_dtype(case)])

    for case in cases:
        rate = rates[compute_dtype(case)]
        needed = (
            FLOOR_SECONDS
            + SAFETY * operations(case, layer_io_fits=False) / rate
            + COMPILE_SECONDS * case.setting.compiled
        )
        remaining = end - time.monotonic()
        fields = {**case.setting._asdict(), **case._asdict()}
        del fields["setting"]
        if remaining < needed:
            yield {**fields, "skipped": f"{remaining:.0f} s remain and it may take {needed:.0f} s"}
        else:
            yield {**fields, **(attempt(functools.partial(begin, case), device) or {})}


def beside_step(outcomes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the outcomes with seconds over those of the uncompiled step on the same batches, if that was measured."""
    same = "model", "lora", "dtype", "n_u", "n_e", "width"
    plain = (o for o in outcomes if o["method"] == "step" and not o["compiled"] and "seconds" in o)
    steps = {tuple(o[k] for k in same): o["seconds"] for o in plain}
    return [
        {**o, "seconds_over_step": o["seconds"] / steps[key]}
        if "seconds" in o and (key := tuple(o[k] for k in same)) in steps
        else o
        for o in outcomes
    ]


def line(o: dict[str, Any]) -> str:
    """Return an outcome in one line."""
    kind = ("LoRA" if o["lora"] else "full") + (" compiled" if o["compiled"] else "")
    name = f"{o['model']} {kind} {o['dtype']} {o['method']} {o['n_u']} x {o['n_e']} x {o['width']}"
    if "seconds" not in o:
        return f"{name}: " + (f"skipped, {o['skipped']}" if "skipped" in o else o["error"])
    memory = "" if o["peak_memory_bytes"] is None else f", {o['peak_memory_bytes'] / 2**30:.1f} GiB"
    goal = "" if o["goal_met"] is None else f", goal {o['goal_seconds']:g} s {'met' if o['goal_met'] else 'missed'}"
    rates = f"{o['tokens_per_second']:.0f} tokens/s, {o['fraction_of_matmul_rate']:.0%} of matmul"
    return f"{name}: {o['seconds']:.3f} s, {rates}{memory}{goal}"


def report(device: str, rates: dict[str, float], minutes: float, outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the report of a run.

    Args:
        device: ``cuda`` or ``cpu``.
        rates: operations per second of matrix products by dtype.
        minutes: time limit of the run.
        outcomes: measured, skipped and failed cases.
    """
    return {
        "environment": environment(),
        "device": _card() if device == "cuda" else {"name": "cpu"},
        "matmul_flops_per_second": rates,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "minutes": minutes,
        "tokens_at_once": TOKENS_AT_ONCE,
        "memory_budget_bytes": MEMORY_BUDGET,
        "cases": outcomes,
    }


def _card() -> dict[str, Any]:
    card = torch.cuda.get_device_properties(0)
    return {
        "name": card.name,
        "capability": [card.major, card.minor],
        "total_memory_bytes": card.total_memory,
        "multi_processor_count": card.multi_processor_count,
        "cuda": torch.version.cuda,
    }
