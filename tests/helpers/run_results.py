"""Results of a run with chosen figures, and the finding of one health check on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fx_influence.lab.health import Finding, health
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.results import EntropyInfluenceResults, EvaluationResults

LR = 1e-3

SOUND: dict[str, Any] = {
    "total": -4.0,
    "total_stderr": 0.5,
    "residual": 1e-7,
    "eta_trust": 1.0,
    "rounding_floor": 1e-9,
    "off_policy": 1e-5,
    "rollouts": 64,
}


def make_results(
    evaluation: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    dtype: str = "auto",
    **arrays: Any,
) -> EntropyInfluenceResults:
    """Return results of ten rollouts with small standard errors, and a step at half and at the full learning rate.

    The standard errors are of eight parts of E.

    Args:
        evaluation: changes to the summary of the evaluation.
        run: changes to the summary of the run.
        dtype: that of the plan.
        arrays: changes to the arrays of the evaluation.
    """
    defaults = {
        "per_sequence": np.array([1.0, -2.0] * 5),
        "stderr": np.full(10, 0.1),
        "deviations": np.zeros((8, 10)),
        "eta": np.array([0.5 * LR, LR]),
        "ess": np.array([64.0, 60.0]),
        "full_clip_fraction": np.array([0.0, 0.0]),
    }
    summary = {**SOUND, **(evaluation or {})}
    evaluated = EvaluationResults({**defaults, **arrays}, None, summary, [])
    plan = EntropyInfluencePlan.from_dict({"dtype": dtype})
    run_summary = {**summary, "lr": LR, **(run or {})}
    return EntropyInfluenceResults(Path("run"), plan, {}, run_summary, [], [], {}, (evaluated,))


def find_finding(name: str, *arguments: Any, **options: Any) -> Finding | None:
    """Return the finding of one health check on ``make_results(*arguments, **options)``, or None without one."""
    return next((finding for finding in health(make_results(*arguments, **options)) if finding.name == name), None)
