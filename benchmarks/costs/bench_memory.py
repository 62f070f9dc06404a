"""Measure the peak memory that each phase adds to a process, as N, V and T grow.

python -m benchmarks memory            writes results/memory.json and the table in README.md; five minutes
python -m benchmarks memory --quick    a tiny model, written nowhere, to check that it works
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

import fx_influence as fx
from benchmarks.costs.problems import Problem, Setting, problem
from benchmarks.harness import COSTS, one_thread, parser, peak_extra_bytes, print_peak_extra, store
from fx_influence.autodiff.directional import token_jvp
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.gram import gradient_gram
from fx_influence.autodiff.token_values import token_values
from fx_influence.interop.runtime.environment import environment

NAME, MODULE = "bench_memory", "benchmarks.costs.bench_memory"
CASES: dict[str, tuple[Setting, str]] = {
    "step, 16 rows": (Setting("3M"), "step"),
    "JVP alone, 16 rows": (Setting("3M"), "jvp"),
    "adjoint that keeps nothing, 16 rows": (Setting("3M"), "adjoint_frugal"),
    "adjoint that keeps nothing, 64 rows": (Setting("3M", rows=64), "adjoint_frugal"),
    "adjoint that keeps nothing, 16 rows of 256": (Setting("3M", width=256), "adjoint_frugal"),
    "adjoint that keeps nothing, 64 rows of 256": (Setting("3M", rows=64, width=256), "adjoint_frugal"),
    "adjoint, 16 rows": (Setting("3M"), "adjoint"),
    "adjoint, 64 rows": (Setting("3M", rows=64), "adjoint"),
    "M of 32 x 32, 4M parameters": (Setting("4M", rows=32), "matrix"),
    "M of 64 x 64, 9M parameters": (Setting("9M", rows=64), "matrix"),
    "adjoint, V = 151,936, 2048 tokens": (Setting("wide", lora=True), "adjoint"),
    "all logits at once, V = 151,936, 2048 tokens": (Setting("wide", lora=True), "logits"),
    "JVP, one row of 2048 tokens": (Setting("3M", lora=True, rows=1, width=2048), "jvp"),
    "JVP, one row of 4096 tokens": (Setting("3M", lora=True, rows=1, width=4096), "jvp"),
    "JVP, one row of 4096 tokens, all scores at once": (Setting("3M", lora=True, rows=1, width=4096), "jvp_eager"),
}
"""Setting and work by title, which is the key in the stored figures."""


def work(p: Problem, name: str) -> Callable[[], object]:
    """Return the work whose memory is measured."""

    def influence(**options: Any) -> object:
        return fx.influence(p.params, p.u, p.e, p.state, apply=p.apply, stderr=False, **options)

    def logits() -> object:
        with torch.no_grad():
            return token_values(p.params, p.u, p.apply)

    works: dict[str, Callable[[], object]] = {
        "step": lambda: [batch_gradient(p.params, batch, p.apply) for batch in (p.u, p.e)],
        "jvp": lambda: token_jvp(p.params, p.gain, p.u, p.apply),
        # A plain function hides backbone and head, so the library's blockwise attention and chunked head are not used.
        "jvp_eager": lambda: token_jvp(p.params, p.gain, p.u, lambda params, ids, mask: p.apply(params, ids, mask)),
        "adjoint": influence,
        "adjoint_frugal": lambda: influence(memory_budget=0),
        "matrix": lambda: gradient_gram(p.params, p.e, p.u, p.gain, p.apply),
        "logits": logits,
    }
    return works[name]


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the page."""
    rows = [f"| {_label(title)} | {size / 2**20:.0f} MiB |" for title, size in report["peak_extra_bytes"].items()]
    return "\n".join(["| work | peak of the extra memory |", "|---|---|", *rows])


def _label(title: str) -> str:
    return title.replace("adjoint that keeps nothing", "adjoint without caches").replace("JVP alone", "JVP only")


def main(argv: list[str] | None = None) -> int:
    command = parser(__doc__)
    command.add_argument("--memory", nargs=5, help=argparse.SUPPRESS)
    arguments = command.parse_args(argv)
    one_thread()
    if arguments.memory:
        size, kind, rows, width, name = arguments.memory
        print_peak_extra(work(problem(Setting(size, kind == "lora", int(rows), int(width))), name))
        return 0
    tiny = Setting("tiny", rows=4, width=24)
    cases = {name: (tiny, name) for name in ("step", "jvp_eager", "logits")} if arguments.quick else CASES
    extra = {title: _peak_extra(setting, name) for title, (setting, name) in cases.items()}
    report = {"environment": environment(), "peak_extra_bytes": extra}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {COSTS: {NAME: markdown(report)}})
    return 0


def _peak_extra(setting: Setting, name: str) -> int:
    kind = "lora" if setting.lora else "full"
    return peak_extra_bytes(MODULE, setting.size, kind, str(setting.rows), str(setting.width), name)


if __name__ == "__main__":
    sys.exit(main())
