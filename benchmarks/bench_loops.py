"""Finite steps and first-order influences beside the loop that one writes first, and beside bare forwards.

    python -m benchmarks loops            writes results/loops.json and the README's table; half an hour
    python -m benchmarks loops --quick    a tiny model once, written nowhere: it only shows that this works

The loop: for each rollout of U one backward, its direction, and one perturbed pass over E, whose pass at theta is made
before and not counted. Rollouts have many lengths, padded on both sides, as sampled ones do. The loop over all of U
takes too long to be repeated: a few of its rollouts are timed beside the library, and the loop's seconds are theirs
times |U| / few, which is what a loop costs. Without padding the loop's first order takes (3 |U| + |U| |E|) /
(5 |U| + 3 |E|) times the operations, 15 for 64 and 256, and its finite steps (3 + |E|) / |E| times: what there is
beyond that is padding not computed, rows that go together, and prompts that eight rows share, as GRPO samples them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

import fx_influence as fx
from benchmarks import by_hand
from benchmarks.harness import PAIRS, README, flops, one_thread, ratios, store
from benchmarks.problems import Problem, Setting, problem
from fx_influence.batching.rows import select_rows
from fx_influence.interop.runtime.environment import environment
from fx_influence.types import Params

NAME = "bench_loops"
ETA = 1e-3
FEW = 2
WAYS = {"rows": 1, "chunks": by_hand.ROWS_AT_ONCE}


def directions(p: Problem, count: int) -> Params:
    """v_i of the first rollouts of U, (count, ...) by name."""
    gradients = fx.per_sample_grads(fx.rollout_loss(p.apply), p.params, select_rows(p.u, slice(count)))
    return {name: p.gain[name] * g for name, g in gradients.items()}


def measure(setting: Setting, e_rows: int, pairs: int) -> dict[str, Any]:
    """The loop's seconds and flops over the library's, by rows of E at a time; the sweep's over bare forwards'."""
    p = problem(setting, varied=True, e_rows=e_rows)
    base = by_hand.scored(p, p.params)
    sweep = fx.snis_sweep(p.params, p.e, apply=p.apply, objective=fx.Entropy("sequence"))

    def first_order() -> object:
        return fx.influence(p.params, p.u, p.e, p.state, apply=p.apply, stderr=False)

    def finite() -> torch.Tensor:
        return sweep(directions(p, FEW), [ETA]).delta_h[0]

    def loop(at_once: int) -> Callable[[], torch.Tensor]:
        return lambda: by_hand.loop(p, range(FEW), ETA, base, at_once)

    loops = {name: loop(at_once) for name, at_once in WAYS.items()}
    wanted, full = next(iter(loops.values()))(), problem(setting, e_rows=e_rows)
    times = len(p.u.input_ids) / FEW
    of_loop = flops(next(iter(loops.values())))
    return {
        "setting": setting._asdict(),
        "title": f"{setting.size}, {'a prompt each' if setting.group == 1 else f'{setting.group} to a prompt'}",
        "first_order": {name: _scaled(r, times) for name, r in ratios(loops, first_order, pairs).items()},
        "finite": ratios(loops, finite, pairs),
        "flops": {"first_order": times * of_loop / flops(first_order), "finite": of_loop / flops(finite)},
        "bare": ratios({"sweep": _sweep(full)}, lambda: by_hand.bare_forwards(full, FEW), pairs)["sweep"],
        "finite_disagreement": float((finite() - wanted).abs().max() / wanted.abs().max()),
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
            cells = [f"{s[kind][way]['median']:.3g}x" for s in settings]
            lines.append(f"| {what}, {how} | {' | '.join(cells)} |")
        cells = [f"{s['flops'][kind]:.3g}x" for s in settings]
        lines.append(f"| {what}, operations | {' | '.join(cells)} |")
    cells = [f"{s['bare']['median']:.2f}" for s in settings]
    return "\n".join(
        [*lines, f"| finite steps / bare forwards of E, one a direction, no padding | {' | '.join(cells)} |"]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, written nowhere")
    arguments = parser.parse_args(argv)
    one_thread()
    if arguments.quick:
        print(markdown({"settings": [measure(Setting("tiny", rows=4, width=24, group=2), 6, pairs=1)]}))
        return 0
    settings = [measure(Setting(size, rows=64, group=g), 256, PAIRS) for size in ("tiny", "3M") for g in (1, 8)]
    report = {"environment": environment(), "pairs": PAIRS, "settings": settings}
    print(markdown(report))
    store(NAME, report, {README: markdown(report)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
