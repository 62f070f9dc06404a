"""Measure the cost of each method for influences beside one training step, and beside the same written by hand.

    python -m benchmarks routes            writes results/routes.json and the table in README.md; one hour and a half
    python -m benchmarks routes --quick    a tiny model once, written nowhere, to check that it works

The unit is the forward and reverse pass over U plus those over E, with |U| = |E|, by the library's own reverse pass,
which is faster than a plain one (``by_hand``). Peak memory is what a fresh process adds to its peak while it does the
work. A setting is stored as soon as it is measured; a stored one is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import fx_influence as fx
from benchmarks.costs import by_hand
from benchmarks.costs.problems import Problem, Setting, problem
from benchmarks.harness import (
    COSTS,
    PAIRS,
    flops,
    one_thread,
    parser,
    peak_extra_bytes,
    print_peak_extra,
    ratios,
    result_path,
    store,
)
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.gram import gradient_gram
from fx_influence.batching.rows import select_rows
from fx_influence.interop.runtime.environment import environment

NAME, MODULE = "bench_routes", "benchmarks.costs.bench_routes"
METHODS = {
    "adjoint": "every rollout and token, momentum, decay, residual: `influence(..., stderr=False)`",
    "adjoint_compiled": "the same with `make_functional(model, compiled=True)`",
    "adjoint_by_hand": "the same as a script without the library",
    "grad_eighth": "E an eighth of U, with the trainer's gradient, over the step on U only: `grad=g`",
    "per_sequence": "rollouts only: `influence(..., per_token=False, stderr=False)`",
    "error_bars": "rollouts, tokens and error bars from 8 random groups of prompts (default): `influence(...)`",
    "matrix": "M only, the pairwise influences, by layer inputs and output gradients",
    "matrix_by_hand": "M by `vmap(grad)`, as a script without the library",
}
SMALL = ("adjoint", "adjoint_compiled", "adjoint_by_hand", "grad_eighth", "per_sequence", "error_bars", "matrix")
LARGE = ("adjoint", "adjoint_by_hand", "grad_eighth", "per_sequence")
SETTINGS: dict[Setting, tuple[str, ...]] = {
    Setting("3M"): SMALL,
    Setting("3M", lora=True): SMALL,
    Setting("4M", rows=32): ("adjoint", "per_sequence", "matrix", "matrix_by_hand"),
    Setting("9M"): (*LARGE, "matrix"),
    Setting("9M", lora=True): (*LARGE, "matrix"),
    Setting("3M", rows=64, width=256): LARGE,
    Setting("9M", rows=64, width=256): LARGE,
    Setting("3M", rows=64, group=8): (*LARGE, "error_bars"),
    Setting("3M", lora=True, rows=64, group=8): (*LARGE, "error_bars"),
}


def works(setting: Setting, names: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    """Return the work of each method, of the unit as ``step`` and of the step on U only as ``step_u``."""
    p = problem(setting)
    # A trainer does not share prefixes, and neither does the library where no two rows have the same prompt.
    unshared = p if setting.group == 1 else problem(setting._replace(group=1))
    # Compiled only where it is measured, because that takes half a minute.
    compiled = problem(setting, compiled=True) if "adjoint_compiled" in names else p
    eighth = select_rows(p.e, slice(0, max(1, len(p.e.input_ids) // 8)))

    def influence(p: Problem = p, **options: Any) -> object:
        return fx.influence(p.params, p.u, options.pop("e", p.e), p.state, apply=p.apply, **options)

    available: dict[str, Callable[[], object]] = {
        "step": lambda: [batch_gradient(unshared.params, batch, unshared.apply) for batch in (unshared.u, unshared.e)],
        "step_u": lambda: batch_gradient(unshared.params, unshared.u, unshared.apply),
        "adjoint": lambda: influence(stderr=False),
        "adjoint_compiled": lambda: influence(compiled, stderr=False),
        "adjoint_by_hand": lambda: by_hand.adjoint(p),
        "grad_eighth": lambda: influence(stderr=False, e=eighth, grad=p.gradient),
        "per_sequence": lambda: influence(stderr=False, per_token=False),
        "error_bars": lambda: influence(),
        "matrix": lambda: gradient_gram(p.params, p.e, p.u, p.gain, p.apply),
        "matrix_by_hand": lambda: by_hand.matrix(p),
    }
    return {name: available[name] for name in ("step", "step_u", *names)}


def measure(setting: Setting, names: tuple[str, ...], pairs: int, with_memory: bool = True) -> dict[str, Any]:
    """Return seconds and flops of every method in units of its step, and what it adds to the peak memory.

    Args:
        setting: size of the problem.
        names: methods, see ``METHODS``.
        pairs: paired runs of each method and the step.
        with_memory: whether to measure the memory of every method, in a process each, and not of the step alone.
    """
    by_step = works(setting, names)
    step, step_u = by_step.pop("step"), by_step.pop("step_u")
    by_step_u = {name: by_step.pop(name) for name in ("grad_eighth",) if name in by_step}
    times = ratios(by_step, step, pairs) | (ratios(by_step_u, step_u, pairs) if by_step_u else {})
    unit = {"grad_eighth": flops(step_u)}
    step_flops = flops(step)
    routes: dict[str, Any] = {}
    for name, work in (by_step | by_step_u).items():
        # The counter does not see the products of a compiled pass, which are those of the eager one.
        counted = {} if name == "adjoint_compiled" else {"flops": flops(work) / unit.get(name, step_flops)}
        routes[name] = {**counted, "seconds": times[name]}
    for name in ("step", *names) if with_memory else ("step",):
        routes.setdefault(name, {})["peak_extra_bytes"] = peak_extra_bytes(MODULE, json.dumps(setting), name)
    trained = sum(x.numel() for x in problem(setting).params.values())
    return {"setting": setting._asdict(), "title": setting.title, "trained": trained, "routes": routes}


def markdown(report: dict[str, Any]) -> str:
    """Return the table: of each method, seconds and flops over the step's, and extra MiB."""
    settings = report["settings"]
    lines = ["| method | " + " | ".join(s["title"] for s in settings) + " |", "|---|" + "---|" * len(settings)]
    for name, title in {**METHODS, "step": "the step itself: forward and reverse over U and over E"}.items():
        lines.append(f"| {title} | " + " | ".join(_cell(s["routes"].get(name)) for s in settings) + " |")
    return "\n".join(lines)


def _cell(method: dict[str, Any] | None) -> str:
    if method is None:
        return ""
    cells = [f"{method['seconds']['median']:.2f} s"] if "seconds" in method else []
    cells += [f"{method['flops']:.2f} f"] if "flops" in method else []
    cells += [f"{method['peak_extra_bytes'] / 2**20:.0f} MiB"] if "peak_extra_bytes" in method else []
    return ", ".join(cells)


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    one_thread()
    if arguments.memory:
        setting, name = arguments.memory
        print_peak_extra(works(Setting(*json.loads(setting)), (name,))[name])
        return 0
    if arguments.quick:
        names = tuple(name for name in METHODS if name != "adjoint_compiled")
        tiny = [measure(Setting("tiny", lora, 4, 24), names, pairs=1, with_memory=False) for lora in (False, True)]
        print(markdown({"settings": tiny}))
        return 0
    stored, titles = _stored(), [setting.title for setting in SETTINGS]
    report = {"environment": environment(), "pairs": PAIRS, "settings": stored}
    for setting, names in SETTINGS.items():
        if setting.title not in [s["title"] for s in stored]:
            print(setting.title, flush=True)
            stored.append(measure(setting, names, PAIRS))
            stored.sort(key=lambda s: titles.index(s["title"]))
            store(NAME, report, {COSTS: {NAME: markdown(report)}})
    print(markdown(report))
    return 0


def _stored() -> list[dict[str, Any]]:
    path = result_path(NAME)
    return list(json.loads(path.read_text(encoding="utf-8"))["settings"]) if path.exists() else []


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    command = parser(__doc__)
    command.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    return command.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
