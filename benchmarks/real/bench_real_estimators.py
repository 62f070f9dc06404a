"""Measure which estimator uses 32 evaluation rollouts of a pretrained chat model best.

    python -m benchmarks real_estimators              SmolLM2-135M-Instruct with LoRA; ten minutes a state on a core,
                                                      resumed at the influences at which it stopped
    python -m benchmarks.real.bench_real_estimators --collect
                                                      measures nothing: the tables of the states that are measured
    python -m benchmarks real_estimators --quick      the embedded policy, few rollouts, written nowhere

At eight states of a GRPO run on tasks of reasoning-gym the influences of 32 rollouts, 8 prompts x 4, are estimated by
the objectives of the benchmark ``estimators``, from 32 fresh rollouts of 8 other prompts and cross-fitted on the step's
own, and compared with those of the default on 112 rollouts of 56 further prompts, whose error bars enter the coverage.
Influences are affine in the share of the score term, so that those of all shares come from two.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fx_influence as fx
from benchmarks.evidence.bench_cross_fitting import covered
from benchmarks.evidence.bench_estimators import NAME as SMALL_POLICIES
from benchmarks.evidence.bench_estimators import OBJECTIVES, bias_is_measured, error_of, noise_share
from benchmarks.evidence.estimator_tables import SLOPE, error_ratios, errors, format_factor
from benchmarks.harness import format_interval, mean_interval, result_path, write_json
from benchmarks.real.bench_real_counterfactual import COMPLETIONS, progress
from benchmarks.real.pretrained_states import PretrainedState, StateBenchmark, load_pretrained_state
from fx_influence.estimators.deviations import Deviations
from fx_influence.estimators.score_term import optimal_share
from fx_influence.interop.runtime.environment import environment
from fx_influence.lab.plan import EntropyInfluencePlan

NAME = "bench_real_estimators"
DEFAULT, DIRECT, FULL = "per_decision", "no score term", "per_decision, shrunk"
"""The default estimator; and those of which the other shares of the score term are mixtures."""
TRUTH, FRESH, CROSS_FITTED = "truth", "fresh E", "cross-fitted"
PASSES: dict[str, tuple[str, ...]] = {
    TRUTH: (DEFAULT,),
    FRESH: (DEFAULT, FULL, DIRECT),
    CROSS_FITTED: (DEFAULT, FULL, DIRECT),
}
"""Estimators that are measured, by kind of E."""
MIXED = ("half the score term, shrunk", "estimated share of the score term, shrunk")
"""Estimators that follow from two of these."""


class Estimate(NamedTuple):
    """Influences of U's rollouts (n,) with their deviations by part of E."""

    per_sequence: Tensor
    deviations: Deviations

    @property
    def stderr(self) -> Tensor:
        """Return the standard error of each influence, (n,)."""
        return self.deviations.stderr()


def measure(plan: EntropyInfluencePlan, rollouts: Path, file: Path) -> dict[str, Any]:
    """Return the influences of every estimator by kind of E; those that ``file`` has are not measured again.

    Args:
        plan: of U, a fresh E and the E of the truth.
        rollouts: folder of theirs; those that are there are not sampled again.
        file: of the influences.
    """
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    missing = [(kind, name) for kind, names in PASSES.items() for name in names if name not in stored.get(kind, {})]
    if missing:
        state = load_pretrained_state(plan, rollouts)
        for k, (kind, name) in enumerate(missing):
            stored.setdefault(kind, {})[name] = influences(state, kind, OBJECTIVES[name])
            write_json(file, stored)
            progress(f"{rollouts.name}: influences", k + 1, len(missing))
    return stored


def influences(state: PretrainedState, kind: str, objective: fx.Entropy) -> dict[str, Any]:
    """Return the influences of U's rollouts over a kind of E as JSON values, with processor seconds."""
    evaluation = {TRUTH: state.others, FRESH: state.fresh, CROSS_FITTED: None}[kind]
    start = time.process_time()
    with bias_is_measured():
        out = state.influence(evaluation, objective=objective, per_token=False)
    assert out.deviations is not None
    return {
        "per_sequence": out.per_sequence.tolist(),
        "by_part": out.deviations.by_part.tolist(),
        "left_out": out.deviations.left_out.tolist(),
        "seconds": time.process_time() - start,
    }


def estimates(stored: Mapping[str, Any]) -> dict[str, Estimate]:
    """Return the stored estimates over one kind of E, and where both are there the mixtures of two of them."""
    measured = {
        name: Estimate(
            torch.tensor(x["per_sequence"], dtype=torch.float64),
            Deviations(torch.tensor(x["by_part"], dtype=torch.float64), torch.tensor(x["left_out"])),
        )
        for name, x in stored.items()
    }
    if DIRECT not in measured or FULL not in measured:
        return measured
    return measured | {name: with_share(measured[DIRECT], measured[FULL], OBJECTIVES[name].score) for name in MIXED}


def with_share(direct: Estimate, full: Estimate, score: float | str) -> Estimate:
    """Return the estimate with a share of the score term, "auto" the one of the smallest squared error.

    Args:
        direct: the estimate without the score term.
        full: the estimate with all of it, by the same parts of E.
        score: as in ``fx.Entropy``.
    """
    if score == "auto":
        score = optimal_share(direct.per_sequence, full.per_sequence, direct.deviations, full.deviations)
    share = float(score)
    by_part = torch.lerp(direct.deviations.by_part, full.deviations.by_part, share)
    deviations = full.deviations._replace(by_part=by_part)
    return Estimate(torch.lerp(direct.per_sequence, full.per_sequence, share), deviations)


def figures(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the errors of a state's estimates by kind of E, and the share of noise in their truth.

    They are over the rollouts with a loss, as equal zeros of all others would raise rank correlations; the tenth of the
    largest is of all.
    """
    truth = estimates(stored[TRUTH])[DEFAULT]
    moves = truth.per_sequence != 0
    by_kind = {kind: estimates(stored[kind]) for kind in (FRESH, CROSS_FITTED)}
    return {
        "truth_noise_share": noise_share(truth),
        "errors": {
            kind: [
                {
                    "estimator": name,
                    "rollouts": len(truth.per_sequence),
                    "each": COMPLETIONS,
                    **error_of(estimate.per_sequence[moves], truth.per_sequence[moves]),
                    "top": error_of(estimate.per_sequence, truth.per_sequence)["top"],
                    SLOPE: float(estimate.per_sequence @ truth.per_sequence / truth.per_sequence.square().sum()),
                    "noise_share": noise_share(estimate),
                    "coverage": covered(estimate, truth),
                }
                for name, estimate in of_kind.items()
            ]
            for kind, of_kind in by_kind.items()
        },
    }


def report_of(model: str, stored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return figures and summary of the states whose influences are all stored.

    Every state counts as a run, so that intervals are over states.
    """
    complete = [x for x in stored if all(set(names) <= x.get(kind, {}).keys() for kind, names in PASSES.items())]
    if not complete:
        raise ValueError("states with all influences are 0; expected one at least. Measure without --collect")
    states = [figures(x) for x in complete]
    runs = [
        {"policy": f"{model}, {kind}", "found": [{"errors": errors_of_kind}]}
        for state in states
        for kind, errors_of_kind in state["errors"].items()
    ]
    return {
        "environment": environment(),
        "states": len(states),
        "truth_noise_share": mean_interval([state["truth_noise_share"] for state in states]),
        "summary": {"estimators": errors(runs), "beside": error_ratios(runs, COMPLETIONS)},
        "runs": runs,
    }


COLUMNS = {
    SLOPE: "size, slope on the truth",
    "spearman": "rank correlation",
    "top": "of the top tenth identified, with its sign",
    "noise_share": "share of noise, by error bars",
    "coverage": "coverage of 95% intervals",
}
"""Heads of the table by figure; all but the first two are shares."""


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table by estimator, and that of squared errors over the default's by policy."""
    noise = f"{format_interval(report['truth_noise_share'], '.0f', 100)}%"
    states = f"States: {report['states']}. Share of noise in the truth of each, by its error bars: {noise}."
    return "\n\n".join(["\n".join(_errors(report)), states, "\n".join(_over_policies(report))])


def _errors(report: Mapping[str, Any]) -> list[str]:
    ratios = {(x["policy"], x["way"]): x["ratio"] for x in report["summary"]["beside"]}
    heads = ["squared error", f"over that of {DEFAULT}", *COLUMNS.values()]
    lines = [f"| E, estimator | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for row in report["summary"]["estimators"]:
        ratio = ratios.get((row["policy"], _way(row["estimator"], row["each"])))
        cells = [format_interval(row["squared_error"], ".2f"), format_factor(ratio)]
        cells += [format_interval(row[name], ".2f") for name in list(COLUMNS)[:2]]
        cells += [f"{format_interval(row[name], '.0f', 100)}%" for name in list(COLUMNS)[2:]]
        kind = row["policy"].rpartition(", ")[2]
        lines.append(f"| {kind}, {_title(row['estimator'])} | {' | '.join(cells)} |")
    return lines


def _over_policies(report: Mapping[str, Any]) -> list[str]:
    """Return the table of ratios over all policies: of the small ones the smallest and largest over sizes of E."""
    small = json.loads(result_path(SMALL_POLICIES).read_text(encoding="utf-8"))["summary"]["beside"]
    policies = list(dict.fromkeys(x["policy"] for x in small))
    of_model = {(x["policy"], x["way"]): x["ratio"] for x in report["summary"]["beside"]}
    kinds = list(dict.fromkeys(policy for policy, _ in of_model))
    lines = [
        f"| squared error over that of {DEFAULT} | {' | '.join([*policies, *kinds])} | largest |",
        "|---|" + "---|" * (len(policies) + len(kinds) + 1),
    ]
    for name in OBJECTIVES:
        if name == DEFAULT:
            continue
        means = {
            policy: [x["ratio"]["mean"] for x in small if (x["policy"], x["way"]) == (policy, _way(name, 2))]
            for policy in policies
        }
        ratios = {kind: of_model.get((kind, _way(name, COMPLETIONS))) for kind in kinds}
        largest = [*(x for values in means.values() for x in values), *(r["mean"] for r in ratios.values() if r)]
        cells = [f"{min(values):.2g} to {max(values):.2g}" for values in means.values()]
        cells += [format_factor(ratio) for ratio in ratios.values()]
        lines.append(f"| {_title(name)} | {' | '.join(cells)} | {max(largest):.2g} |")
    return lines


def _way(name: str, each: int) -> str:
    return f"{name}, {each} a prompt"


def _title(name: str) -> str:
    return name if OBJECTIVES[name].score == 1 else f"{name} (biased)"


BENCHMARK = StateBenchmark(NAME, __doc__, measure, report_of, markdown)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
