"""Methods that the GPU benchmark measures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fx_influence as fx
from benchmarks.gpu.cases import DIRECTIONS, ETA, MEMORY_BUDGET
from benchmarks.gpu.problems import Task
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.gram import gradient_gram
from fx_influence.types import Batch, Gradients


class Result(NamedTuple):
    """Values of a method, to be compared with float32, and its relative residual, if it has these."""

    values: Tensor | None = None
    residual: float | None = None


Work = Callable[[], Result]


def _step(t: Task) -> Work:
    def work() -> Result:
        for batch in (t.u, t.e):
            _gradient(t, batch)
        return Result()

    return work


def _gradient(t: Task, batch: Batch) -> Gradients:
    p = t.problem
    return batch_gradient(p.params, batch, p.apply, chunk_size=t.rows_at_once(p.setting.dtype))


def _influence(t: Task, memory_budget: int = 0, **options: Any) -> Work:
    p = t.problem
    # No budget by default: at these sizes the library's default budget does not fit the cache of a single pass either.
    options |= {"chunk_size": t.rows_at_once(p.setting.dtype), "memory_budget": memory_budget}

    def work() -> Result:
        # No residual exceeds 2: one that the library would reject is reported with its seconds.
        out = fx.influence(p.params, t.u, t.e, p.state, apply=p.apply, tolerance=2.0, **options)
        total = out.per_sequence.sum() + out.residual
        magnitude = torch.maximum(out.per_sequence.abs().sum(), total.abs())
        return Result(out.per_sequence, float(out.residual.abs() / magnitude))

    return work


def _adjoint_grad(t: Task) -> Work:
    return _influence(t, stderr=False, grad=_gradient(t, t.u))


def _matrix(t: Task) -> Work:
    p = t.problem
    options: dict[str, Any] = {"memory_budget": MEMORY_BUDGET, "chunk_size": t.rows_at_once(p.setting.dtype)}
    # A diagonal of the size of AdamW's, without the pass over U that AdamW's would take.
    diagonal = {name: s.add(1e-10).rsqrt() for name, s in p.state.exp_avg_sq.items()}
    return lambda: Result(gradient_gram(p.params, t.e, t.u, diagonal, p.apply, **options).double())


def _sweep(t: Task) -> Work:
    p, rows = t.problem, t.rows_at_once("float32")
    block = {name: torch.randn(DIRECTIONS, *x.shape, device=x.device) for name, x in p.params.items()}

    def work() -> Result:
        fx.snis_sweep(p.params, t.e, apply=p.apply, chunk_size=rows)(block, [ETA])
        # It computes in float32 whatever the model's dtype, so there is nothing to compare.
        return Result()

    return work


METHODS: dict[str, Callable[[Task], Work]] = {
    "step": _step,
    "adjoint": functools.partial(_influence, stderr=False),
    "adjoint_grad": _adjoint_grad,
    "per_sequence": functools.partial(_influence, memory_budget=MEMORY_BUDGET, stderr=False, per_token=False),
    "error_bars": functools.partial(_influence, memory_budget=MEMORY_BUDGET),
    "matrix": _matrix,
    "sweep": _sweep,
}
"""Functions that prepare a method, unmeasured, and return the work to measure, by ``Case.method``."""
