"""Say in plain words how far a training run's account can be trusted, and where its entropy runs out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fx_influence.attribution.display import CONDITIONING_REMEDY, ILL_CONDITIONED
from fx_influence.estimators.consistency import ROUNDING_WARNED
from fx_influence.estimators.stderr import interval_half_width
from fx_influence.interop.ledger.file import STEP
from fx_influence.lab.health import DEFAULT_RESIDUAL_BOUND, Finding
from fx_influence.lab.health.step_length import EFFECTIVE_SAMPLE, MAX_DEVIATION, MIN_ESS
from fx_influence.lab.health.validity import IDENTITY, MAX_UNATTRIBUTED
from fx_influence.lab.training.account import Series, account, degrees_of_freedom, measured_degrees_of_freedom
from fx_influence.lab.training.load import Training

MAX_STEP_ROUNDING = 0.1
"""Largest share of a step that rounding of the weights may swallow, as in ``interop.trl.precision``."""

MAX_OFF = 0.25
"""Largest share of measured steps with a determined sign that may be longer than the first order holds."""

RECENT = 20
"""Measured steps from which the pace of the entropy is taken, the last ones."""

STEPS_LEFT = 500
"""Number of steps, at the recent pace, below which an entropy that is used up within them is an alert."""


def training_health(training: Training) -> list[Finding]:
    """Return the findings on a training run, those that need attention first.

    Args:
        training: from ``load_training``. A check whose figures no step has is left out.
    """
    findings = [finding for check in CHECKS if (finding := check(training)) is not None]
    return sorted(findings, key=lambda finding: ("attention", "unknown", "good").index(finding.level))


def check_residuals(training: Training) -> Finding | None:
    """Compare the residuals of reverse and forward mode with what their precision allows."""
    share = _of_absolute(training, "residual")
    text = "Forward and reverse mode differ by at most {:.1e} of the sum of |influence|"
    remedy = "Do not trust these steps: something was computed in low precision"
    return _at_most(training, IDENTITY, share, DEFAULT_RESIDUAL_BOUND, text, remedy)


def check_roundings(training: Training) -> Finding | None:
    """Compare two roundings of the influences with their size."""
    text = "Two methods of computing the influences differ by at most {:.1e} of the sum of |influence|"
    remedy = "Mistrust influences smaller than that"
    return _at_most(
        training, "Rounding of the influences", _of_absolute(training, "rounding"), ROUNDING_WARNED, text, remedy
    )


def check_step_roundings(training: Training) -> Finding | None:
    """Tell how much of the steps is lost by rounding of the weights."""
    text = "Rounding of the weights swallows at most {:.2g} of a step"
    remedy = "Train weights in float32: these in lower precision hardly move"
    share = training.steps["step_rounding"]
    return _at_most(training, "Rounding of the weights", share, MAX_STEP_ROUNDING, text, remedy)


def check_unattributed_terms(training: Training) -> Finding | None:
    """Compare what the trainer's gradients hold beyond the rollouts with their influences."""
    text = "The trainer's gradient outside of the rollouts is at most {:.2g} of the sum of |influence|"
    remedy = "Look for rounding in half precision, or a loss that is not a sum over tokens"
    share = _of_absolute(training, "unattributed")
    return _at_most(training, "Unattributed", share, MAX_UNATTRIBUTED, text, remedy)


def check_conditionings(training: Training) -> Finding | None:
    """Tell where influences rest on denominators that AdamW has from the very gradient of the step."""
    text = "At most {:.0%} of the sum of |influence| rests on denominators that AdamW has from the step's gradient"
    share = training.steps["conditioning"]
    return _at_most(training, "Conditioning", share, ILL_CONDITIONED, text, CONDITIONING_REMEDY)


def check_effective_samples(training: Training) -> Finding | None:
    """Tell how much of E the importance weights leave where the change was measured."""
    lost = 1 - training.steps["ess"] / training.steps["evaluation_count"]
    text = "Importance weights take at most {:.0%} of E's rollouts"
    remedy = "The measured change rests on too few there"
    return _at_most(training, EFFECTIVE_SAMPLE, lost, 1 - MIN_ESS, text, remedy)


def check_first_orders(training: Training) -> Finding | None:
    """Compare predicted with measured changes in the steps whose sign the error bars determine."""
    steps = training.steps
    if not training.splits_the_step:
        return None
    degrees = degrees_of_freedom(training)
    told = np.abs(steps["total"]) > interval_half_width(steps["stderr"], degrees)
    told &= np.isfinite(steps["measured"])
    if not told.any():
        return None
    difference = np.abs(steps["total"] - steps["measured"])
    off = told & (difference > MAX_DEVIATION * np.abs(steps["measured"]))
    # Bounds of the error, in ledgers of older versions, would hide nearly every difference.
    known = steps["unexplained_stderr"]
    off &= np.isnan(known) | (difference > interval_half_width(known, degrees))
    share = off.sum() / told.sum()
    first = f", the first of them step {steps[STEP][off][0]}" if off.any() else ""
    text = (
        f"In {off.sum()} of the {told.sum()} measured steps whose sign is determined the predicted change is more than "
        f"{MAX_DEVIATION:.0%} off the measured one, beyond the error of the difference where it is known{first}"
    )
    if share > MAX_OFF:
        text = f"{text}: the steps are longer than the first order holds, so read shares, not digits."
        return Finding("First order", "attention", text)
    return Finding("First order", "good", f"{text}.")


def check_sign_of_sum(training: Training) -> Finding | None:
    """Tell whether the sum of the predicted changes is clear of its standard error."""
    steps, name = training.steps, "Sign of the change"
    if not training.splits_the_step:
        return None
    degrees = degrees_of_freedom(training)
    total = Series(steps["total"], steps["stderr"]).summed("total", degrees)
    if not np.isfinite(total.stderr):
        return Finding(name, "unknown", "Not every measured step has a standard error, so the sum has none.")
    told = int((np.abs(steps["total"]) > interval_half_width(steps["stderr"], degrees)).sum())
    text = f"{told} of {len(steps[STEP])} measured steps have a predicted change whose 95% interval excludes 0"
    if not total.sign:
        return Finding(name, "attention", f"{text}; their sum has not: the draws of E do not tell its sign.")
    return Finding(name, "good", f"{text}, and so has their sum.")


def check_unmoved(training: Training) -> Finding | None:
    """Count the steps in which no rollout moves the entropy."""
    unmoved = training.steps["absolute"] == 0
    if not unmoved.any():
        return None
    text = (
        f"No rollout moves the entropy in {unmoved.sum()} of {len(unmoved)} measured steps, as where the completions "
        "of each prompt all earn the same. Choose prompts that are sometimes solved and sometimes not."
    )
    return Finding("Nothing moved", "attention", text)


def check_pace(training: Training) -> Finding | None:
    """Tell whether the entropy would be used up soon at the pace of the last measured steps."""
    steps = training.steps
    change, entropy = steps["measured"][-RECENT:], float(steps["entropy"][-1])
    known = np.isfinite(change)
    if known.sum() < 2 or not np.isfinite(entropy):
        return None
    count, degrees = int(known.sum()), measured_degrees_of_freedom(training)[-RECENT:][known]
    recent = Series(change[known], steps["measured_stderr"][-RECENT:][known])
    _, pace, error, _ = mean = recent.summed("pace", degrees, 1 / count)
    name = "Pace"
    if mean.sign >= 0:
        return Finding(name, "good", f"The last {count} measured steps show no fall of the entropy beyond its error.")
    left = entropy / -pace
    text = (
        f"The last {count} measured steps lower the entropy by {-pace:.2g} ± {error:.1g} nats each; at this pace its "
        f"{entropy:.3g} nats are used up in {left:,.0f} steps"
    )
    if left < STEPS_LEFT:
        return Finding(name, "attention", f"{text}.{_main_cause(training)}")
    return Finding(name, "good", f"{text}.")


def _main_cause(training: Training) -> str:
    """Return a sentence on the term that lowers the entropy most over the run, if there is an account."""
    if not training.splits_the_step:
        return ""
    lowest = min(account(training).terms, key=lambda term: term.value)
    return f" Of the run's terms {lowest.name} lowers it most, by {-lowest.value:.2g} nats." if lowest.value < 0 else ""


CHECKS: tuple[Callable[[Training], Finding | None], ...] = (
    check_residuals,
    check_pace,
    check_roundings,
    check_step_roundings,
    check_unattributed_terms,
    check_conditionings,
    check_sign_of_sum,
    check_first_orders,
    check_effective_samples,
    check_unmoved,
)
"""Checks in order: those that spoil every figure, the entropy itself, those that bear on the sums."""


def _of_absolute(training: Training, name: str) -> np.ndarray:
    """Return a column's size over the sum of |influence|, (S,), NaN in steps where no rollout moves the entropy."""
    size = training.steps["absolute"]
    return np.abs(training.steps[name]) / np.where(size > 0, size, np.nan)


def _at_most(training: Training, name: str, values: np.ndarray, bound: float, text: str, remedy: str) -> Finding | None:
    """Return the finding that values (S,) do or do not exceed a bound.

    Args:
        training: the measured steps.
        name: of the check.
        values: (S,), NaN where a step has none; no step has one: no finding.
        bound: the largest value that is good.
        text: sentence with a place for the largest value.
        remedy: sentence on what to do where a value exceeds the bound.
    """
    known = np.isfinite(values)
    if not known.any():
        return None
    sentence, above = text.format(values[known].max()), known & (values > bound)
    if not above.any():
        return Finding(name, "good", f"{sentence}.")
    first = training.steps[STEP][above][0]
    where = f"more than {bound:g} in {above.sum()} of {known.sum()} measured steps, first in step {first}"
    return Finding(name, "attention", f"{sentence}, {where}. {remedy}.")
