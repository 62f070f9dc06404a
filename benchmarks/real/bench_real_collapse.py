"""Measure which tokens lower the entropy of a pretrained chat model, and check the field's claims about it.

    python -m benchmarks real_collapse              SmolLM2-135M-Instruct with LoRA; five minutes a state on a core,
                                                    resumed at the state at which it stopped
    python -m benchmarks real_collapse --collect    measures nothing: the tables of the states that are measured
    python -m benchmarks real_collapse --quick      the embedded policy, few rollouts, written nowhere

At eight states of a GRPO run on tasks of reasoning-gym the influence of every token of 32 rollouts, 8 prompts x 4, on
the entropy is computed, with E of 144 rollouts of 64 other prompts. Kinds of tokens are those of the benchmark
``collapse``, whose stored figures of small policies stand beside these in the table of claims.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.evidence.bench_collapse import NAME as SMALL_POLICIES
from benchmarks.evidence.bench_collapse import figures_of_tokens, kinds_of_tokens, summary
from benchmarks.harness import format_interval, mean_interval, result_path, write_json
from benchmarks.real.pretrained_states import MEMORY_BUDGET, StateBenchmark, load_pretrained_state
from fx_influence.interop.runtime.environment import environment
from fx_influence.lab.plan import EntropyInfluencePlan

NAME = "bench_real_collapse"


FIGURES = {
    "sum": "sum in 1e-6 nats a step",
    "share": "share of all influence",
    "of_falls": "share of all that lowers",
    "rank": "rank correlation",
}
"""Figures of kinds of tokens as ``bench_collapse`` stores them; "rank" is that of influence with minus a proxy."""


class Claim(NamedTuple):
    """A claim about some kinds of tokens: the sum of a figure over them is above or below a bound."""

    text: str
    source: str
    kinds: tuple[str, ...]
    figure: str
    """One of ``FIGURES``."""
    is_above: bool
    bound: float = 0.0

    def describe(self) -> str:
        """Return the claim with its figure and bound, for a table."""
        return f"{self.text}: {FIGURES[self.figure]} {'above' if self.is_above else 'below'} {self.bound:g}"

    def of_state(self, state: Mapping[str, Any]) -> float:
        """Return the figure at a state."""
        if self.figure == "rank":
            return sum(float(state["ranks"][kind]) for kind in self.kinds)
        return sum(float(state["cells"][kind][self.figure]) for kind in self.kinds)

    def verdict(self, interval: Mapping[str, float | None]) -> str:
        """Return whether the mean is on the claimed side of the bound beyond its 95% interval."""
        mean, half_width = interval["mean"], interval["half_width"]
        if mean is None or half_width is None or abs(mean - self.bound) <= half_width:
            return "not told"
        return "yes" if (mean > self.bound) == self.is_above else "no"


LIKELY, UNLIKELY = ("A > 0, likely", "A < 0, likely"), ("A > 0, unlikely", "A < 0, unlikely")
REGIONS = "2602.03392, 2602.09782"
RAISED = f"2505.22617, {REGIONS}, 2605.11775"
CLAIMS = (
    Claim("raising likely tokens lowers the entropy", RAISED, LIKELY[:1], "sum", False),
    Claim("raising unlikely tokens raises it", RAISED, UNLIKELY[:1], "sum", True),
    Claim("lowering likely tokens raises it", REGIONS, LIKELY[1:], "sum", True),
    Claim("lowering unlikely tokens lowers it", REGIONS, UNLIKELY[1:], "sum", False),
    Claim("positive advantages cause most of the fall", "2511.05993", (LIKELY[0], UNLIKELY[0]), "of_falls", True, 0.5),
    Claim(
        "the 2% of highest covariance cause much of it",
        "2505.22617, table 1, figure 8",
        ("top 2% by covariance",),
        "of_falls",
        True,
        0.1,
    ),
    Claim("the covariance ranks tokens", "2505.22617", ("covariance",), "rank", True, 0.5),
    Claim("the fifth of highest entropy moves most", "2506.01939", ("top 20% by entropy",), "share", True, 0.5),
)


def measure(plan: EntropyInfluencePlan, rollouts: Path, file: Path) -> dict[str, Any]:
    """Return the figures of the tokens of U, see ``figures_of_tokens``.

    Args:
        plan: of U and of the rollouts of E.
        rollouts: folder of theirs; those that are there are not sampled again.
        file: of the figures; those that it has are not measured again.
    """
    if not file.exists():
        state = load_pretrained_state(plan, rollouts)
        out = state.influence(state.held_out, stderr=False, memory_budget=MEMORY_BUDGET)
        lr = state.opt_state.lr
        write_json(file, {"lr": lr, **figures_of_tokens(out, state.update, state.u.values, state.u.rollouts, lr)})
    return dict(json.loads(file.read_text(encoding="utf-8")))


def report_of(model: str, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return figures and summary of the states, each of which counts as a run, so that intervals are over states."""
    runs = [{"policy": model, "lr": state["lr"], "found": [state]} for state in states]
    return {"environment": environment(), "summary": summary(runs), "runs": runs}


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table of claims, and that of the main kinds of tokens."""
    return "\n\n".join(["\n".join(_claims(report)), "\n".join(kinds_of_tokens(report))])


def _claims(report: Mapping[str, Any]) -> list[str]:
    small = json.loads(result_path(SMALL_POLICIES).read_text(encoding="utf-8"))["runs"]
    policies: dict[str, list[list[Mapping[str, Any]]]] = {}
    for run in [*report["runs"], *small]:
        policies.setdefault(run["policy"], []).append(run["found"])
    lines = [
        f"| claim | arXiv | {' | '.join(f'{policy}: measured, agrees' for policy in policies)} |",
        "|---|---|" + "---|" * len(policies),
    ]
    for claim in CLAIMS:
        cells = []
        for runs in policies.values():
            interval = mean_interval([fmean(map(claim.of_state, states)) for states in runs])
            assert interval is not None
            cells.append(f"{_format(claim, interval)}: {claim.verdict(interval)}")
        lines.append(f"| {claim.describe()} | {claim.source} | {' | '.join(cells)} |")
    return lines


def _format(claim: Claim, interval: Mapping[str, float | None]) -> str:
    if claim.figure == "rank":
        return format_interval(interval, "+.2f")
    if claim.figure == "sum":
        return format_interval(interval, "+.3g", 1e6)
    return format_interval(interval, ".2f")


BENCHMARK = StateBenchmark(NAME, __doc__, measure, report_of, markdown)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
