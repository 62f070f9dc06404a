"""Measure the error of influences for weights in bfloat16 and float32 against float64.

    python -m benchmarks precision            writes results/precision.json and the table in README.md; two minutes
    python -m benchmarks precision --quick    a tiny model, written nowhere, to check that it works

The weights are rounded to bfloat16 first and then widened, so that all three are the same policy.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import fx_influence as fx
from benchmarks.costs.problems import Problem, Setting, problem
from benchmarks.harness import COSTS, one_thread, parser, store
from fx_influence.interop.runtime.environment import environment

NAME = "bench_precision"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def influences(p: Problem, dtype: torch.dtype) -> fx.Influence:
    """Return the influences of the policy rounded to bfloat16, computed in ``dtype``; the optimizer state is exact."""
    apply = p.apply if dtype == torch.bfloat16 else p.apply.with_min_precision(dtype)
    params = {name: x.to(torch.bfloat16).to(dtype) for name, x in p.params.items()}
    return fx.influence(params, p.u, p.e, p.state, apply=apply, stderr=False, tolerance=float("inf"))


def measure(setting: Setting) -> dict[str, Any]:
    """Return largest and median error of each dtype, over the largest influence, and the adjoint test's residual."""
    p = problem(setting)
    exact = influences(p, torch.float64)
    errors = {name: _compare(influences(p, dtype), exact) for name, dtype in DTYPES.items()}
    return {"setting": setting._asdict(), "title": setting.title, "dtypes": errors}


def _compare(out: fx.Influence, exact: fx.Influence) -> dict[str, float]:
    assert out.per_token is not None
    assert exact.per_token is not None
    magnitude = torch.maximum(out.per_sequence.abs().sum(), (out.per_sequence.sum() + out.residual).abs())
    return {
        **{f"per_sequence_{k}": x for k, x in _errors(out.per_sequence, exact.per_sequence).items()},
        **{f"per_token_{k}": x for k, x in _errors(out.per_token, exact.per_token).items()},
        "wrong_signs": float((out.per_sequence.sign() != exact.per_sequence.sign()).double().mean()),
        "relative_residual": float(out.residual.abs() / magnitude),
    }


def _errors(values: Tensor, exact: Tensor) -> dict[str, float]:
    errors = (values - exact).abs()[exact != 0] / exact.abs().max()
    return {"largest": float(errors.max()), "median": float(errors.median())}


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the page."""
    lines = [
        "| | rollout: largest, median error | token: largest, median error | wrong signs | residual |",
        "|---|---|---|---|---|",
    ]
    for setting in report["settings"]:
        for name, x in setting["dtypes"].items():
            pairs = [f"{x[f'{k}_largest']:.1e}, {x[f'{k}_median']:.1e}" for k in ("per_sequence", "per_token")]
            tail = f"{x['wrong_signs']:.0%} | {x['relative_residual']:.1e}"
            lines.append(f"| {setting['title']}, {name} | {' | '.join(pairs)} | {tail} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__).parse_args(argv)
    one_thread()
    settings = (Setting("tiny", rows=4, width=24),) if arguments.quick else (Setting("3M"), Setting("9M"))
    report = {"environment": environment(), "settings": [measure(setting) for setting in settings]}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {COSTS: {NAME: markdown(report)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
