"""Compare influences and finite steps with the loop that one would write first, and with plain forward passes.

    python -m benchmarks loops            writes results/loops.json and the table in README.md; half an hour
    python -m benchmarks loops --quick    a tiny model once, written nowhere, to check that it works

The loop makes, for each rollout of U, one backward pass, its direction, and one perturbed pass over E; the pass at
theta is made before and not counted. Rollouts have many lengths, padded on both sides, as sampled ones do. The loop
over all of U takes too long to be repeated: a few of its rollouts are timed beside the library, and the loop's seconds
are theirs times |U| / few, which is what a loop costs. Without padding the loop's first order takes (3 |U| + |U| |E|) /
(5 |U| + 3 |E|) times the operations, 15 for 64 and 256, and its finite steps (3 + |E|) / |E| times: the rest is
padding that is not computed, rows that are batched, and prompts that eight rows share, as GRPO samples them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

import fx_influence as fx
from benchmarks.costs import by_hand
from benchmarks.costs.problems import Problem, Setting, problem
from benchmarks.harness import COSTS, PAIRS, flops, one_thread, parser, ratios, store
from fx_influence.batching.rows import select_rows
from fx_influence.interop.runtime.environment import environment
from fx_influence.types import Params

NAME = "bench_loops"
ETA = 1e-3
TIMED = 2
ROWS_PER_PASS = {"rows": 1, "chunks": by_hand.ROWS_AT_ONCE}


def directions(p: Problem, count: int) -> Params:
    """Return v_i of the first rollouts of U, (count, ...) by name."""
    gradients = fx.per_sample_grads(fx.rollout_loss(p.apply), p.params, select_rows(p.u, slice(count)))
    return {name: p.gain[name] * g for name, g in gradients.items()}


def measure(setting: Setting, e_rows: int, pairs: int) -> dict[str, Any]:
    """Return seconds and flops of the loop over the library's, and of the sweep over plain forward passes.

    Args:
        setting: size of the problem.
        e_rows: rows of E.
        pairs: paired runs.
    """
    p = problem(setting, varied=True, e_rows=e_rows)
    base = by_hand.score(p, p.params)
    sweep = fx.snis_sweep(p.params, p.e, apply=p.apply, objective=fx.Entropy("sequence"))

    def first_order() -> object:
        return fx.influence(p.params, p.u, p.e, p.state, apply=p.apply, stderr=False)

    def finite() -> torch.Tensor:
        return sweep(directions(p, TIMED), [ETA]).delta_h[0]

    def loop(rows: int) -> Callable[[], torch.Tensor]:
        return lambda: by_hand.loop(p, range(TIMED), ETA, base, rows)

    loops = {name: loop(rows) for name, rows in ROWS_PER_PASS.items()}
    expected, unpadded = next(iter(loops.values()))(), problem(setting, e_rows=e_rows)
    times = len(p.u.input_ids) / TIMED
    loop_flops = flops(next(iter(loops.values())))
    return {
        "setting": setting._asdict(),
        "title": f"{setting.size}, {'a prompt each' if setting.group == 1 else f'{setting.group} to a prompt'}",
        "first_order": {name: _scaled(r, times) for name, r in ratios(loops, first_order, pairs).items()},
        "finite": ratios(loops, finite, pairs),
        "flops": {"first_order": times * loop_flops / flops(first_order), "finite": loop_flops / flops(finite)},
        "bare": ratios({"sweep": _sweep(unpadded)}, lambda: by_hand.plain_forwards(unpadded, TIMED), pairs)["sweep"],
        "finite_disagreement": float((finite() - expected).abs().max() / expected.abs().max()),
    }


def _sweep(p: Problem) -> Callable[[], object]:
    block = directions(p, TIMED)
    sweep = fx.snis_sweep(p.params, p.e, apply=p.apply)
    return lambda: sweep(block, [ETA])


def _scaled(ratio: dict[str, float], times: float) -> dict[str, float]:
    return {name: value * times for name, value in ratio.items()}


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the page."""
    settings = report["settings"]
    lines = ["| | " + " | ".join(s["title"] for s in settings) + " |", "|---|" + "---|" * len(settings)]
    for kind, title in (("first_order", "loop / first order by the adjoint"), ("finite", "loop / finite steps")):
        for key, rows in (("rows", "E row by row"), ("chunks", f"E {by_hand.ROWS_AT_ONCE} rows at a time")):
            cells = [f"{s[kind][key]['median']:.3g}x" for s in settings]
            lines.append(f"| {title}, {rows} | {' | '.join(cells)} |")
        cells = [f"{s['flops'][kind]:.3g}x" for s in settings]
        lines.append(f"| {title}, operations | {' | '.join(cells)} |")
    cells = [f"{s['bare']['median']:.2f}" for s in settings]
    return "\n".join(
        [*lines, f"| finite steps / plain forwards of E, one per direction, no padding | {' | '.join(cells)} |"]
    )


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__).parse_args(argv)
    one_thread()
    if arguments.quick:
        print(markdown({"settings": [measure(Setting("tiny", rows=4, width=24, group=2), 6, pairs=1)]}))
        return 0
    settings = [measure(Setting(size, rows=64, group=g), 256, PAIRS) for size in ("tiny", "3M") for g in (1, 8)]
    report = {"environment": environment(), "pairs": PAIRS, "settings": settings}
    print(markdown(report))
    store(NAME, report, {COSTS: {NAME: markdown(report)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
