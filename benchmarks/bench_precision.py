"""What lower precision of the weights costs: influences in bfloat16 and float32 against float64.

    python -m benchmarks precision            writes results/precision.json and the README's table; two minutes
    python -m benchmarks precision --quick    a tiny model, written nowhere: it only shows that this works

The weights are rounded to bfloat16 first and then widened, so that all three are the same policy.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

import fx_influence as fx
from benchmarks.harness import README, one_thread, store
from benchmarks.problems import Problem, Setting, problem
from fx_influence.interop.runtime.environment import environment

NAME = "bench_precision"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def influences(p: Problem, dtype: torch.dtype) -> fx.Influence:
    """Of the policy rounded to bfloat16, computed in ``dtype``; the optimizer's state stays as it is."""
    apply = p.apply if dtype == torch.bfloat16 else p.apply.with_min_precision(dtype)
    params = {name: x.to(torch.bfloat16).to(dtype) for name, x in p.params.items()}
    return fx.influence(params, p.u, p.e, p.state, apply=apply, stderr=False, tolerance=float("inf"))


def measure(setting: Setting) -> dict[str, Any]:
    """Of each dtype the largest and the median error, over the largest influence, and the guard's figure."""
    p = problem(setting)
    exact = influences(p, torch.float64)
    found = {name: _against(influences(p, dtype), exact) for name, dtype in DTYPES.items()}
    return {"setting": setting._asdict(), "title": setting.title, "dtypes": found}


def _against(out: fx.Influence, exact: fx.Influence) -> dict[str, float]:
    assert out.per_token is not None
    assert exact.per_token is not None
    size = torch.maximum(out.per_sequence.abs().sum(), (out.per_sequence.sum() + out.residual).abs())
    return {
        **{f"per_sequence_{k}": x for k, x in _errors(out.per_sequence, exact.per_sequence).items()},
        **{f"per_token_{k}": x for k, x in _errors(out.per_token, exact.per_token).items()},
        "wrong_signs": float((out.per_sequence.sign() != exact.per_sequence.sign()).double().mean()),
        "relative_residual": float(out.residual.abs() / size),
    }


def _errors(found: Tensor, exact: Tensor) -> dict[str, float]:
    off = (found - exact).abs()[exact != 0] / exact.abs().max()
    return {"largest": float(off.max()), "median": float(off.median())}


def markdown(report: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        "| | rollout: largest, median error | token: largest, median error | wrong signs | guard |",
        "|---|---|---|---|---|",
    ]
    for setting in report["settings"]:
        for name, x in setting["dtypes"].items():
            pairs = [f"{x[f'{k}_largest']:.1e}, {x[f'{k}_median']:.1e}" for k in ("per_sequence", "per_token")]
            tail = f"{x['wrong_signs']:.0%} | {x['relative_residual']:.1e}"
            lines.append(f"| {setting['title']}, {name} | {' | '.join(pairs)} | {tail} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, written nowhere")
    arguments = parser.parse_args(argv)
    one_thread()
    settings = (Setting("tiny", rows=4, width=24),) if arguments.quick else (Setting("3M"), Setting("9M"))
    report = {"environment": environment(), "settings": [measure(setting) for setting in settings]}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {README: markdown(report)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
