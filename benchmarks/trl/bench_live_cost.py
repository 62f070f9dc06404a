"""Measure what every measured step costs a live training, by the size of the policy and by where its E comes from.

    python -m benchmarks live_cost            writes results/live_cost.json and the table in README.md; half an hour
    python -m benchmarks live_cost --quick    the smallest policy, one round, written nowhere

The embedded policy and larger random ones of its tokenizer are trained by TRL's ``GRPOTrainer`` on its prompts, 64
rollouts a step (8 prompts x 8). In turn a training run is measured in every step on its own rollouts, in every step on
an E of its own (64 held-out prompts x 2, sampled anew), and not at all. Figures are processor seconds of a step with
its sampling, the first step of a training run left out.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from benchmarks.evidence.arithmetic import build_model, build_tokenizer
from benchmarks.harness import COSTS, PAIRS, one_thread, parser, store
from benchmarks.real.tasks import by_length
from benchmarks.trl.bench_frameworks import StepSeconds
from benchmarks.trl.bench_trl_run import attach, trainer
from benchmarks.trl.variants import quiet
from fx_influence.interop.runtime.environment import environment
from fx_influence.interop.trl import EntropyInfluence

NAME = "bench_live_cost"
STEPS = 3


class Size(NamedTuple):
    """A policy: its title, its size in ``arithmetic.SIZES``, None for the embedded one, and its goals by kind of E."""

    title: str
    size: str | None = None
    goals: Mapping[str, float] = MappingProxyType({})


UPDATE, FRESH = "update", "fresh"
KINDS: dict[str, Callable[[Any], EntropyInfluence]] = {
    UPDATE: lambda training: EntropyInfluence(every=1).attach(training),
    FRESH: lambda training: attach(training, 1),
}
"""Ways of attaching the measurement, with E the step's own rollouts, or 128 of other prompts."""
SIZES = (
    Size("the embedded policy", goals={UPDATE: 1.6, FRESH: 2.5}),
    Size("a random one", "large"),
    Size("a random one", "largest", {UPDATE: 1.35, FRESH: 1.6}),
)


def policy_options(size: Size) -> dict[str, Any]:
    """Return arguments of ``trainer``: random policies earn by length, since they solve nothing."""
    if size.size is None:
        return {}
    torch.manual_seed(0)
    return {"model": build_model(build_tokenizer(), size.size), "reward": by_length}


def step_seconds(size: Size, kind: str | None) -> tuple[float, int]:
    """Return the processor seconds of a step, the mean over those after the first, and the number of parameters.

    Args:
        size: the policy.
        kind: how steps are measured, None for a plain training run.
    """
    clock = StepSeconds()
    with tempfile.TemporaryDirectory() as out, quiet():
        training = trainer(out, STEPS, **policy_options(size))
        influence = None if kind is None else KINDS[kind](training)
        training.add_callback(clock)
        training.train()
    if influence is not None and len(influence.history) != STEPS:
        raise RuntimeError(f"history has {len(influence.history)} steps; expected {STEPS}. Read the warnings")
    return statistics.fmean(clock.seconds[1:]), sum(p.numel() for p in training.model.parameters())


def costs(size: Size, rounds: int) -> dict[str, Any]:
    """Return the processor seconds of a plain step, and of measured ones over it, of training runs in turn."""
    plain: list[float] = []
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for k in range(rounds):
        seconds, parameters = step_seconds(size, None)
        plain.append(seconds)
        kinds = list(KINDS)
        for kind in kinds[k % 2 :] + kinds[: k % 2]:
            ratios[kind].append(step_seconds(size, kind)[0] / seconds)
        print(f"{size.title}: round {k + 1} of {rounds}", file=sys.stderr, flush=True)
    return {
        "title": size.title,
        "goals": {**size.goals},
        "parameters": parameters,
        "seconds": statistics.median(plain),
        "ratios": {
            kind: {"median": statistics.median(x), "lowest": min(x), "highest": max(x)} for kind, x in ratios.items()
        },
    }


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the page."""
    lines = [
        "| policy | parameters | step, s | `every=1` / without, on its own rollouts | goal | on its own E | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["policies"]:
        cells = [row["title"], f"{row['parameters'] / 1e6:.2g}M", f"{row['seconds']:.2g}"]
        for kind in KINDS:
            x = row["ratios"][kind]
            cells.append(f"{x['median']:.1f} ({x['lowest']:.1f} to {x['highest']:.1f})")
            cells.append(f"{row['goals'][kind]:g}" if kind in row["goals"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__, "the smallest policy, one round, written nowhere").parse_args(argv)
    one_thread()
    sizes, rounds = (SIZES[:1], 1) if arguments.quick else (SIZES, PAIRS)
    report = {"environment": environment(), "rounds": rounds, "policies": [costs(size, rounds) for size in sizes]}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {COSTS: {NAME: markdown(report)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
