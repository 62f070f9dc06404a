"""The first sentence on a run, in the terminal and on the page: the change of the entropy, and how certain its sign."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fx_influence.estimators.stderr import interval_half_width
from fx_influence.lab.console.numbers import with_error
from fx_influence.lab.health import INVALIDATING, Finding, has_small_ess, health, value_at_lr
from fx_influence.lab.results import EntropyInfluenceResults


class Change(NamedTuple):
    """Delta H of the step in nats by one method, its standard error over the draw of E, and the degrees of that."""

    name: str
    value: float
    stderr: float | None
    degrees_of_freedom: float

    @property
    def sign(self) -> int | None:
        """Return -1, 0 or 1; None where the 95% interval of the change includes 0."""
        if self.stderr is None or not self.value:
            return int(np.sign(self.value))
        told = abs(self.value) > interval_half_width(self.stderr, self.degrees_of_freedom)
        return int(np.sign(self.value)) if told else None

    @property
    def magnitude(self) -> str:
        """Return the absolute value with its error bar, for a sentence that names the direction."""
        return with_error(abs(self.value), self.stderr)

    @property
    def signed(self) -> str:
        """Return the value with its sign and its error bar."""
        return f"{'−' if self.value < 0 else '+'}{self.magnitude}"


class Headline(NamedTuple):
    """The sentence on one E, the changes that it rests on, and the checks, the gravest first."""

    sentence: str
    changes: list[Change]
    findings: list[Finding]


class StepTerm(NamedTuple):
    """A term of the step's total, nats per unit lr; ``kind``: ``sum`` of those above, the ``total``, or neither."""

    name: str
    value: float
    stderr: float | None
    kind: str = ""


def headline(results: EntropyInfluenceResults, evaluation: int = 0) -> Headline:
    """Return what the step does to the entropy over one E, predicted beside measured.

    The sentence names a direction only if the 95% intervals of the predicted change, and of the measured one if there
    is one, exclude 0 and the two agree in sign. Otherwise it begins with that doubt; and if one of the checks that
    invalidate every figure fails, it begins with that check.
    """
    evaluated, lr = results.evaluations[evaluation], results.summary["lr"]
    summary, findings = evaluated.summary, health(results, evaluation)
    error = _scaled(summary["total_stderr"], lr)
    predicted = Change("predicted, first order", summary["total"] * lr, error, evaluated.degrees_of_freedom)
    measured = _measured(results, evaluation)
    reliable = None if has_small_ess(findings) else measured
    sentence = _sentence(predicted, reliable, entropy_unit(results), summary["entropy"])
    failed = [finding.name for finding in findings if finding.level == "attention" and finding.name in INVALIDATING]
    if failed:
        sentence = f"Do not trust these figures ({', '.join(failed)}). {sentence}"
    changes = [predicted, *_second_order(summary, lr), *([measured] if measured else [])]
    return Headline(sentence, changes, findings)


def entropy_unit(results: EntropyInfluenceResults) -> str:
    """Return what the run's entropies refer to: ``per token`` or ``per rollout``."""
    return "per token" if results.plan.normalize == "token" else "per rollout"


def step_terms(summary: dict[str, Any]) -> list[StepTerm]:
    """Return the terms of the step on one E in the order of a table; all but the sums add up to the total.

    ``summary``: of one evaluation; nats per unit lr.
    """
    unattributed = summary.get("unattributed", 0.0)
    return [
        StepTerm("momentum", summary["momentum"], None),
        StepTerm("weight decay", summary["weight_decay"], None),
        StepTerm("baseline, sum of both", summary["baseline"], summary.get("baseline_stderr"), "sum"),
        StepTerm("all rollouts", summary["sum_per_sequence"], summary.get("sum_per_sequence_stderr")),
        *([StepTerm("unattributed", unattributed, None)] if unattributed else []),
        StepTerm("total", summary["total"], summary["total_stderr"], "total"),
    ]


def _sentence(predicted: Change, measured: Change | None, unit: str, entropy: float) -> str:
    now = f"now {entropy:.4f} nats {unit}"
    if not predicted.value and (measured is None or not measured.value):
        return f"To first order this step leaves the policy's entropy unchanged at {entropy:.4f} nats {unit}."
    if predicted.sign is None:
        beside = "" if measured is None else f", measured {measured.signed}"
        return (
            f"E does not determine whether this step raises or lowers the policy's entropy, {now}: to first order it "
            f"changes by {predicted.signed} nats{beside}."
        )
    if measured is not None and measured.sign is None:
        return (
            f"The sign is uncertain: to first order this step {_verb(predicted)} the policy's entropy, {now}, by "
            f"{predicted.magnitude} nats, but {measured.signed} is measured, which E does not distinguish from zero."
        )
    if measured is not None and measured.sign != predicted.sign:
        return (
            f"This step is too long for the first order: it {_verb(measured)} the policy's entropy, {now}, by "
            f"{measured.magnitude} nats as measured, where {predicted.signed} is predicted."
        )
    also = "" if measured is None else f", by {measured.magnitude} as measured"
    bar = "" if predicted.stderr is not None else "; E gives no error bar"
    return (
        f"This step {_verb(predicted)} the policy's entropy by {predicted.magnitude} nats {unit} to first "
        f"order{also}, from {entropy:.4f}{bar}."
    )


def _verb(change: Change) -> str:
    return "lowers" if change.value < 0 else "raises"


def _second_order(summary: dict[str, Any], lr: float) -> list[Change]:
    if summary.get("second_order") is None or not lr:
        return []
    value = summary["total"] * lr + summary["second_order"] * lr**2 / 2
    return [Change("predicted, second order", value, None, np.nan)]


def _measured(results: EntropyInfluenceResults, evaluation: int) -> Change | None:
    evaluated, lr = results.evaluations[evaluation], results.summary["lr"]
    value, stderr = (value_at_lr(evaluated.arrays, name, lr) for name in ("full", "full_stderr"))
    if value is None:
        return None
    # Of a cross-fitted step the change on the same rollouts, each at the step without its own prompt.
    step = evaluated.summary.get("in_this_step", {})
    value, stderr = step.get("measured", value), step.get("measured_stderr", stderr)
    known = None if stderr is None or np.isnan(stderr) else stderr
    return Change("measured, importance sampling", value, known, evaluated.finite_degrees_of_freedom)


def _scaled(error: float | None, lr: float) -> float | None:
    return None if error is None else error * lr
