"""Say in plain words how far a run can be trusted: every check of its figures, and what to do where one fails."""

from __future__ import annotations

from collections.abc import Callable

from fx_influence.lab.health.findings import Figures, Finding, Level, value_at_lr
from fx_influence.lab.health.noise import check_movement, check_ranking, check_rollout_errors, check_sign_of_total
from fx_influence.lab.health.step_length import (
    EFFECTIVE_SAMPLE,
    check_clipping,
    check_effective_sample,
    check_first_order,
    check_prediction,
    check_rounding_floor,
)
from fx_influence.lab.health.validity import (
    DERIVATIVES,
    IDENTITY,
    POLICY_OF_E,
    check_conditioning,
    check_derivatives_agree,
    check_identity_residual,
    check_methods_agree,
    check_policy_of_e,
    check_policy_of_u,
    check_unattributed,
)
from fx_influence.lab.results import EntropyInfluenceResults

__all__ = ["INVALIDATING", "Finding", "Level", "has_small_ess", "health", "value_at_lr"]

INVALIDATING = (IDENTITY, DERIVATIVES, POLICY_OF_E)
"""Names of the checks without which no figure of the run is to be trusted, the total's included."""

RESIDUAL_BOUNDS = {"float64": 1e-9}
DEFAULT_RESIDUAL_BOUND = 1e-4
"""Bounds of the identity's residual by dtype, over the sum of |influence|."""

CHECKS: tuple[Callable[[Figures], Finding | None], ...] = (
    check_identity_residual,
    check_derivatives_agree,
    check_methods_agree,
    check_policy_of_e,
    check_movement,
    check_unattributed,
    check_conditioning,
    check_sign_of_total,
    check_first_order,
    check_prediction,
    check_effective_sample,
    check_clipping,
    check_ranking,
    check_rollout_errors,
    check_rounding_floor,
    check_policy_of_u,
)
"""Checks in order: those that spoil every figure, those that bear on the total, those that bear on single rollouts."""


def health(results: EntropyInfluenceResults, evaluation: int = 0) -> list[Finding]:
    """Return the findings on one E, those that need attention first, the gravest at the head.

    A check whose figures the run did not store, such as the effective sample size of a run without a sweep, is
    ``unknown`` where its absence matters, and left out where it does not apply.

    Args:
        results: of a finished run.
        evaluation: number of E.

    Raises:
        IndexError: where the run has no such evaluation.

    Example, after ``make demo``: ``health(load_run("runs/demo"))[0].level``.
    """
    e = results.evaluations[evaluation]
    bound = RESIDUAL_BOUNDS.get(results.plan.dtype, DEFAULT_RESIDUAL_BOUND)
    advantages = [record["advantage"] for record in results.sequences]
    lr, degrees = results.summary["lr"], e.degrees_of_freedom
    figures = Figures(results.summary, e.summary, e.arrays, lr, bound, advantages, degrees)
    findings = [finding for check in CHECKS if (finding := check(figures)) is not None]
    return sorted(findings, key=lambda finding: ("attention", "unknown", "good").index(finding.level))


def has_small_ess(findings: list[Finding]) -> bool:
    """Return whether the importance weights leave too few rollouts of E to measure a step of this length."""
    return any(finding.name == EFFECTIVE_SAMPLE and finding.level == "attention" for finding in findings)
