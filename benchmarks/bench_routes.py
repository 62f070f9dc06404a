"""What each route to the influences costs beside one training step, and beside the same route written by hand.

    python -m benchmarks routes            writes results/routes.json and the README's table; one hour and a half
    python -m benchmarks routes --quick    a tiny model once, written nowhere: it only shows that this works

The unit is the forward and reverse pass over U plus those over E, with |U| = |E|, by the library's own reverse pass,
which is faster than a plain one (``by_hand``). Peak memory is what a fresh process adds to its peak while it does the
work. A setting is stored as soon as it is measured, and one that is stored is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import fx_influence as fx
from benchmarks import by_hand
from benchmarks.harness import (
    PAIRS,
    README,
    flops,
    one_thread,
    peak_extra_bytes,
    print_peak_extra,
    ratios,
    result,
    store,
)
from benchmarks.problems import Problem, Setting, problem
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.gram import gradient_gram
from fx_influence.batching.rows import select_rows
from fx_influence.interop.runtime.environment import environment

NAME = "bench_routes"
ROUTES = {
    "adjoint": "every rollout and token, momentum, decay, residual: `influence(..., stderr=False)`",
    "adjoint_compiled": "the same with `make_functional(model, compiled=True)`",
    "adjoint_by_hand": "the same as a script without the library",
    "grad_eighth": "E an eighth of U, the trainer's gradient handed in, over the step on U alone: `grad=g`",
    "per_sequence": "rollouts only: `influence(..., per_token=False, stderr=False)`",
    "error_bars": "rollouts, tokens and error bars from 8 unions of prompts (default): `influence(...)`",
    "matrix": "M alone, the part of every eval rollout in every influence, by factors",
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


def works_of(setting: Setting, names: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    """The work of each route, of the unit under ``step`` and of the step on U alone under ``step_u``."""
    p = problem(setting)
    # A trainer takes every row whole, as the library does with the same rows where none shares its prompt.
    whole = p if setting.group == 1 else problem(setting._replace(group=1))
    # Only where it is measured: it takes half a minute to compile.
    fast = problem(setting, compiled=True) if "adjoint_compiled" in names else p
    eighth = select_rows(p.e, slice(0, max(1, len(p.e.input_ids) // 8)))

    def influence(p: Problem = p, **options: Any) -> object:
        return fx.influence(p.params, p.u, options.pop("e", p.e), p.state, apply=p.apply, **options)

    works: dict[str, Callable[[], object]] = {
        "step": lambda: [batch_gradient(whole.params, batch, whole.apply) for batch in (whole.u, whole.e)],
        "step_u": lambda: batch_gradient(whole.params, whole.u, whole.apply),
        "adjoint": lambda: influence(stderr=False),
        "adjoint_compiled": lambda: influence(fast, stderr=False),
        "adjoint_by_hand": lambda: by_hand.adjoint(p),
        "grad_eighth": lambda: influence(stderr=False, e=eighth, grad=p.gradient),
        "per_sequence": lambda: influence(stderr=False, per_token=False),
        "error_bars": lambda: influence(),
        "matrix": lambda: gradient_gram(p.params, p.e, p.u, p.gain, p.apply),
        "matrix_by_hand": lambda: by_hand.matrix(p),
    }
    return {name: works[name] for name in ("step", "step_u", *names)}


def measure(setting: Setting, names: tuple[str, ...], pairs: int) -> dict[str, Any]:
    """Seconds and flops of every route in units of its step, and what it adds to the peak memory."""
    works = works_of(setting, names)
    step, step_u = works.pop("step"), works.pop("step_u")
    alone = {name: works.pop(name) for name in ("grad_eighth",) if name in works}
    found = ratios(works, step, pairs) | (ratios(alone, step_u, pairs) if alone else {})
    unit = {"grad_eighth": flops(step_u)}
    whole = flops(step)
    routes: dict[str, Any] = {}
    for name, work in (works | alone).items():
        # A compiled pass hides its products from the counter; they are those of the pass that is not compiled.
        counted = {} if name == "adjoint_compiled" else {"flops": flops(work) / unit.get(name, whole)}
        routes[name] = {**counted, "seconds": found[name]}
    for name in ("step", *names):
        routes.setdefault(name, {})["peak_extra_bytes"] = peak_extra_bytes(NAME, json.dumps(setting), name)
    trained = sum(x.numel() for x in problem(setting).params.values())
    return {"setting": setting._asdict(), "title": setting.title, "trained": trained, "routes": routes}


def markdown(report: dict[str, Any]) -> str:
    """The README's table: of each route, seconds and flops over the step's, and extra MiB."""
    settings = report["settings"]
    lines = ["| route | " + " | ".join(s["title"] for s in settings) + " |", "|---|" + "---|" * len(settings)]
    for name, what in {**ROUTES, "step": "the step itself: forward and reverse over U and over E"}.items():
        lines.append(f"| {what} | " + " | ".join(_cell(s["routes"].get(name)) for s in settings) + " |")
    return "\n".join(lines)


def _cell(route: dict[str, Any] | None) -> str:
    if route is None:
        return ""
    found = [f"{route['seconds']['median']:.2f} s"] if "seconds" in route else []
    found += [f"{route['flops']:.2f} f"] if "flops" in route else []
    return ", ".join([*found, f"{route['peak_extra_bytes'] / 2**20:.0f} MiB"])


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    one_thread()
    if arguments.memory:
        setting, name = arguments.memory
        print_peak_extra(works_of(Setting(*json.loads(setting)), (name,))[name])
        return 0
    if arguments.quick:
        names = tuple(name for name in ROUTES if name != "adjoint_compiled")
        tiny = [measure(Setting("tiny", lora, 4, 24), names, pairs=1) for lora in (False, True)]
        print(markdown({"settings": tiny}))
        return 0
    stored = _stored()
    report = {"environment": environment(), "pairs": PAIRS, "settings": stored}
    for setting, names in SETTINGS.items():
        if setting.title not in [s["title"] for s in stored]:
            print(setting.title, flush=True)
            stored.append(measure(setting, names, PAIRS))
            store(NAME, report, {README: markdown(report)})
    print(markdown(report))
    return 0


def _stored() -> list[dict[str, Any]]:
    path = result(NAME)
    return list(json.loads(path.read_text(encoding="utf-8"))["settings"]) if path.exists() else []


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, written nowhere")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
