"""Finite steps and first-order influences beside the loop that one writes first, and beside bare forwards.

    python -m benchmarks loops            writes results/loops.json and the README's table; a quarter of an hour
    python -m benchmarks loops --quick    a tiny model once, written nowhere: it only shows that this works

The loop: for each rollout of U one backward, its direction, and one perturbed pass over E. Rollouts have many lengths,
padded on both sides, as sampled ones do. The loop over all of U takes too long to be repeated: a few of its rollouts
are timed beside the library, and the loop's seconds are theirs times |U| / few, which is what a loop costs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import fx_influence as fx
from benchmarks import by_hand
from benchmarks.harness import PAIRS, one_thread, ratios, store
from benchmarks.problems import Problem, Setting, problem
from fx_influence.lab.environment import environment
from fx_influence.types import Params

NAME = "bench_loops"
ETA = 1e-3
FEW = 2


def directions(p: Problem, count: int) -> Params:
    """v_i of the first rollouts of U, (count, ...) by name."""
    some = fx.Batch._make(None if field is None else field[:count] for field in p.u)
    gradients = fx.per_sample_grads(fx.rollout_loss(p.apply), p.params, some)
    return {name: p.gain[name] * g for name, g in gradients.items()}


def measure(setting: Setting, e_rows: int, pairs: int) -> dict[str, Any]:
    """Of each comparison the ratio of seconds, the loop's or the bare forwards' over the library's or the reverse."""
    p = problem(setting, varied=True, e_rows=e_rows)
    block = directions(p, FEW)
    each = [{name: v[i] for name, v in block.items()} for i in range(FEW)]
    sweep = fx.snis_sweep(p.params, p.e, apply=p.apply, estimator="sequence")
    found = (sweep(block, [ETA]).delta_h[0], by_hand.finite(p, each, ETA))
    disagreement = float((found[0] - found[1]).abs().max() / found[1].abs().max())

    def first_order() -> object:
        return fx.influence(p.params, p.u, p.e, p.state, apply=p.apply, stderr=False)

    def loop(rows: int) -> Callable[[], object]:
        return lambda: by_hand.loop(p, range(FEW), ETA, rows)

    def library_finite() -> object:
        return sweep(directions(p, FEW), [ETA])

    times = len(p.u.input_ids) / FEW
    over_first = ratios({"rows": loop(1), "chunks": loop(by_hand.ROWS_AT_ONCE)}, first_order, pairs)
    over_finite = ratios({"rows": loop(1), "chunks": loop(by_hand.ROWS_AT_ONCE)}, library_finite, pairs)
    full = problem(setting, e_rows=e_rows)
    bare = ratios({"sweep": _sweep(full)}, lambda: by_hand.bare_forwards(full, FEW), pairs)
    return {
        "setting": setting._asdict(),
        "title": f"{setting.size}, |U| = {setting.rows}, |E| = {e_rows}, up to {setting.width} tokens",
        "first_order": {name: _scaled(r, times) for name, r in over_first.items()},
        "finite": over_finite,
        "sweep_over_bare_forwards": bare["sweep"],
        "finite_disagreement": disagreement,
    }


def _sweep(p: Problem) -> Callable[[], object]:
    block = directions(p, FEW)
    sweep = fx.snis_sweep(p.params, p.e, apply=p.apply)
    return lambda: sweep(block, [ETA])


def _scaled(ratio: dict[str, float], times: float) -> dict[str, float]:
    return {name: value * times for name, value in ratio.items()}


def markdown(report: dict[str, Any]) -> str:
    """The README's table."""
    settings = report["settings"]
    lines = ["| | " + " | ".join(s["title"] for s in settings) + " |", "|---|" + "---|" * len(settings)]
    for kind, what in (("first_order", "the loop / first order by the adjoint"), ("finite", "the loop / finite steps")):
        for way, how in (("rows", "E row by row"), ("chunks", f"E {by_hand.ROWS_AT_ONCE} rows at a time")):
            cells = " | ".join(f"{s[kind][way]['median']:.3g}x" for s in settings)
            lines.append(f"| {what}, {how} | {cells} |")
    cells = " | ".join(f"{s['sweep_over_bare_forwards']['median']:.2f}" for s in settings)
    return "\n".join([*lines, f"| finite steps / bare forwards of E, one a direction, no padding | {cells} |"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, written nowhere")
    arguments = parser.parse_args(argv)
    one_thread()
    if arguments.quick:
        print(markdown({"settings": [measure(Setting("tiny", rows=4, width=24), 6, pairs=1)]}))
        return 0
    settings = [measure(Setting(size, rows=64), 256, PAIRS) for size in ("tiny", "3M")]
    report = {"environment": environment(), "pairs": PAIRS, "settings": settings}
    print(markdown(report))
    store(NAME, report, markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
