"""Measure which tokens lower the entropy of a pretrained chat model, and check the field's claims about it.

    python -m benchmarks real_collapse              SmolLM2-135M-Instruct with LoRA; five minutes a state on a core,
                                                    resumed at the state at which it stopped
    python -m benchmarks.real.bench_real_collapse --collect
                                                    measures nothing: the tables of the states that are measured
    python -m benchmarks real_collapse --quick      the embedded policy, few rollouts, written nowhere

At eight states of a GRPO run on tasks of reasoning-gym the influence of every token of 32 rollouts, 8 prompts x 4, on
the entropy is computed, with E of 144 rollouts of 64 other prompts. Kinds of tokens are those of the benchmark
``collapse``, whose stored figures of small policies stand beside these in the table of claims.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import fx_influence as fx
from benchmarks.evidence.bench_collapse import NAME as SMALL_POLICIES
from benchmarks.evidence.bench_collapse import SUMMARY_KINDS, appendix, figures_of_tokens, summary
from benchmarks.harness import format_interval, mean_interval, result_path, write_json
from benchmarks.real.pretrained_states import StateBenchmark, load_pretrained_state
from fx_influence.interop.runtime.environment import environment
from fx_influence.lab.plan import EntropyInfluencePlan

NAME = "bench_real_collapse"
UNIT = 1e-3
"""Unit of sums in the appendix, in nats."""

FIGURES = {
    "net": "net share of all influence",
    "share": "share of all influence",
    "of_falls": "share of all that lowers",
    "rank": "rank correlation",
}
"""Figures of kinds of tokens as ``bench_collapse`` stores them; "net" is the sum of influences over that of their
sizes, as sums at different states differ by an order of magnitude, "rank" is that of influence with minus a proxy."""


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
        bound = f"{self.bound:g}" if self.figure == "rank" else f"{self.bound:.0%}"
        return f"{self.text}: {FIGURES[self.figure]} {'above' if self.is_above else 'below'} {bound}"

    def of_state(self, state: Mapping[str, Any]) -> float:
        """Return the figure at a state."""
        if self.figure == "rank":
            return sum(float(state["ranks"][kind]) for kind in self.kinds)
        if self.figure == "net":
            return sum(net_share(state, kind) for kind in self.kinds)
        return sum(float(state["cells"][kind][self.figure]) for kind in self.kinds)

    def verdict(self, interval: Mapping[str, float | None]) -> str:
        """Return whether the mean is on the claimed side of the bound beyond its 95% interval."""
        mean, half_width = interval["mean"], interval["half_width"]
        if mean is None or half_width is None or abs(mean - self.bound) <= half_width:
            return "not told"
        return "yes" if (mean > self.bound) == self.is_above else "no"


def net_share(state: Mapping[str, Any], kind: str) -> float:
    """Return the sum of influences over a kind of tokens, over the sum of |influence| over all tokens.

    The latter is S - 2F, with S the sum of all influences and F that of all that lower. A kind c with the sum s_c and
    the shares a_c of |influence| and f_c of F has a_c (S - 2F) = s_c - 2 f_c F, which gives F.
    """
    cells, total = state["cells"], state["rollouts"]
    known = max(cells.values(), key=lambda cell: abs(cell["of_falls"] - cell["share"]))
    falls = (known["sum"] - known["share"] * total) / (2 * (known["of_falls"] - known["share"]))
    return float(cells[kind]["sum"] / (total - 2 * falls))


LIKELY, UNLIKELY = ("A > 0, likely", "A < 0, likely"), ("A > 0, unlikely", "A < 0, unlikely")
REGIONS = "2602.03392, 2602.09782"
RAISED = f"2505.22617, {REGIONS}, 2605.11775"
CLAIMS = (
    Claim("raising likely tokens lowers the entropy", RAISED, LIKELY[:1], "net", False),
    Claim("raising unlikely tokens raises it", RAISED, UNLIKELY[:1], "net", True),
    Claim("lowering likely tokens raises it", REGIONS, LIKELY[1:], "net", True),
    Claim("lowering unlikely tokens lowers it", REGIONS, UNLIKELY[1:], "net", False),
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
        out = state.influence(state.held_out, stderr=False)
        lr = state.opt_state.lr
        write_json(file, {"lr": lr, **figures_of_tokens(out, state.update, state.u.values, state.u.rollouts, lr)})
    return dict(json.loads(file.read_text(encoding="utf-8")))


def report_of(model: str, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return figures and summary of the states, each of which counts as a run, so that intervals are over states."""
    runs = [{"policy": model, "lr": state["lr"], "found": [state]} for state in states]
    return {"environment": environment(), "summary": summary(runs), "runs": runs}


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table of claims, and that of the main kinds of tokens."""
    states = f"States: {len(report['runs'])}."
    return "\n\n".join(["\n".join(_claims(report)), states, "\n".join(_kinds(report))])


def _claims(report: Mapping[str, Any]) -> list[str]:
    small = json.loads(result_path(SMALL_POLICIES).read_text(encoding="utf-8"))["runs"]
    policies: dict[str, list[list[Mapping[str, Any]]]] = {}
    for run in [*report["runs"], *small]:
        policies.setdefault(run["policy"], []).append(run["found"])
    lines = [
        f"| claim | arXiv | {' | '.join(f'{policy}: mean, runs that agree, verdict' for policy in policies)} |",
        "|---|---|" + "---|" * len(policies),
    ]
    for claim in CLAIMS:
        cells = []
        for runs in policies.values():
            means = [fmean(map(claim.of_state, states)) for states in runs]
            interval = mean_interval(means)
            assert interval is not None
            agreeing = sum((mean > claim.bound) == claim.is_above for mean in means)
            cells.append(f"{_format(claim, interval)}, {agreeing} of {len(means)}: {claim.verdict(interval)}")
        lines.append(f"| {claim.describe()} | {claim.source} | {' | '.join(cells)} |")
    return lines


def _kinds(report: Mapping[str, Any]) -> list[str]:
    states = [state for run in report["runs"] for state in run["found"]]
    heads = ("share of all tokens", FIGURES["share"], FIGURES["of_falls"], FIGURES["net"])
    lines = [f"| tokens | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for kind in (*SUMMARY_KINDS, *fx.labels.THIRDS):
        shares = [
            mean_interval([float(state["cells"][kind][name]) for state in states])
            for name in ("of_tokens", "share", "of_falls")
        ]
        texts = [f"{format_interval(share, '.0f', 100)}%" for share in shares]
        net = mean_interval([net_share(state, kind) for state in states])
        lines.append(f"| {kind} | {' | '.join(texts)} | {format_interval(net, '+.0f', 100)}% |")
    return lines


def _format(claim: Claim, interval: Mapping[str, float | None]) -> str:
    if claim.figure == "rank":
        return format_interval(interval, "+.2f")
    return f"{format_interval(interval, '+.0f' if claim.figure == 'net' else '.0f', 100)}%"


BENCHMARK = StateBenchmark(NAME, __doc__, measure, report_of, markdown, partial(appendix, unit=UNIT))
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
