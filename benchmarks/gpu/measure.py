"""Time one case of the GPU benchmark, and compare its result with float32."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.gpu.cases import MATMUL, RUN_SECONDS, RUNS, SUBSET, Case
from benchmarks.gpu.methods import METHODS, Result, Work
from benchmarks.gpu.operations import has_layer_io, operations
from benchmarks.gpu.problems import Problem, Task, first_rows, in_float32, task
from fx_influence.estimators.consistency import identity_tolerance


def compute_dtype(case: Case) -> str:
    """Return the dtype that the case computes in."""
    return "float32" if case.method == "sweep" else case.setting.dtype


def matmul_rate(dtype: str, device: str) -> float:
    """Return operations per second of one large square product, median of 20."""
    n = MATMUL[device]
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    times = [_timed(lambda: a @ b, device)[0] for _ in range(25)]
    return 2.0 * n**3 / statistics.median(times[5:])


def _timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    _synchronize(device)
    results: list[Any] = []

    def synchronized() -> None:
        results.append(work())
        _synchronize(device)

    return harness.seconds(synchronized), results[0]


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def collect(device: str) -> None:
    """Free the memory of deleted tensors."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure(case: Case, prepared: Problem, device: str, rate: float) -> dict[str, Any]:
    """Return the seconds and derived figures of a method, without its preparation and warm-up.

    Args:
        case: the method and its size.
        prepared: model and training state.
        device: device of both.
        rate: operations per second of the device's matrix products.
    """
    full, prepare = task(case, prepared, device), METHODS[case.method]
    prepare(first_rows(full, full.rows_at_once(compute_dtype(case))))()
    work, layer_io_fits = prepare(full), has_layer_io(full)
    collect(device)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, result = _median(work, device)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    del work
    needed = operations(case, layer_io_fits)
    return {
        "seconds": seconds,
        "tokens_per_second": (case.n_u * (case.method != "sweep") + case.n_e) * case.width / seconds,
        "flops": needed,
        "fraction_of_matmul_rate": needed / seconds / rate,
        "peak_memory_bytes": peak,
        "factors_fit": layer_io_fits,
        "relative_residual": result.residual,
        "within_tolerance": _within(result, prepared),
        "goal_met": None if case.goal_seconds is None else seconds <= case.goal_seconds,
        # In a separate attempt, so that the seconds are reported if float32 does not fit.
        "correctness": attempt(lambda: correctness(case.method, first_rows(full, SUBSET)), device),
    }


def _median(work: Work, device: str) -> tuple[float, Result]:
    runs = [_timed(work, device)]
    while len(runs) < RUNS and sum(seconds for seconds, _ in runs) < RUN_SECONDS:
        runs.append(_timed(work, device))
    return statistics.median(seconds for seconds, _ in runs), runs[-1][1]


def _within(result: Result, prepared: Problem) -> bool | None:
    if result.residual is None:
        return None
    return result.residual <= identity_tolerance(prepared.params, prepared.apply)


def correctness(method: str, subset: Task) -> dict[str, Any] | None:
    """Return the largest error in half precision, relative to the largest value in float32; None if not comparable."""
    half = subset.problem
    # A compiled pass would be recompiled for this subset, twice.
    if half.setting.dtype == "float32" or half.setting.compiled:
        return None
    result = METHODS[method](subset)()
    if result.values is None:
        return None
    exact = METHODS[method](subset._replace(problem=in_float32(half)))()
    assert exact.values is not None
    return {
        "rows": len(subset.u.input_ids),
        "largest_error": float((result.values - exact.values).abs().max() / exact.values.abs().max()),
        "relative_residual": result.residual,
        "within_tolerance": _within(result, half),
        "relative_residual_float32": exact.residual,
    }


def attempt(work: Callable[[], dict[str, Any] | None], device: str) -> dict[str, Any] | None:
    """Return the result of ``work`` or the error that it raised, and free the memory of a failed one."""
    try:
        return work()
    except Exception as error:
        failed = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    collect(device)
    return failed
