"""What a run says first, in the terminal and on the page: the change of the entropy, and whether E tells its sign."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fx_influence.lab.console.numbers import with_error
from fx_influence.lab.health import INVALIDATING, Finding, has_small_ess, health, value_at_lr
from fx_influence.lab.results import EntropyInfluenceResults

SURE = 2.0
"""Standard errors from zero beyond which a sign counts as told."""


class Change(NamedTuple):
    """Delta H of the step in nats, by one way to tell it, with its standard error over the draw of E."""

    name: str
    value: float
    stderr: float | None

    @property
    def sign(self) -> int | None:
        """Return -1, 0 or 1; None where the change is within two standard errors of zero."""
        if self.stderr is not None and 0 < abs(self.value) <= SURE * self.stderr:
            return None
        return int(np.sign(self.value))

    @property
    def size(self) -> str:
        """Return the size with its error bar, for a sentence that names the direction."""
        return with_error(abs(self.value), self.stderr)

    @property
    def signed(self) -> str:
        """Return the value with its sign and its error bar."""
        return f"{'−' if self.value < 0 else '+'}{self.size}"


class Headline(NamedTuple):
    """The sentence on one E, the changes that it rests on, and the checks, the gravest first."""

    sentence: str
    changes: list[Change]
    findings: list[Finding]


class StepTerm(NamedTuple):
    """A part of the step's total, nats per unit lr; ``kind``: ``sum`` of those above, the ``total``, or neither."""

    name: str
    value: float
    stderr: float | None
    kind: str = ""


def headline(results: EntropyInfluenceResults, evaluation: int = 0) -> Headline:
    """Return what the step does to the entropy over one E, predicted beside measured.

    The direction is told only where the predicted change, and the measured one if there is one, are more than two
    standard errors from zero and agree; the sentence begins with that doubt otherwise, and with the checks that spoil
    every figure where one of those fails.
    """
    own, lr = results.evaluations[evaluation].summary, results.summary["lr"]
    findings = health(results, evaluation)
    predicted = Change("predicted, first order", own["total"] * lr, _scaled(own["total_stderr"], lr))
    measured = _measured(results, evaluation)
    sentence = _sentence(predicted, None if has_small_ess(findings) else measured, per(results), own["entropy"])
    spoiled = [finding.name for finding in findings if finding.level == "attention" and finding.name in INVALIDATING]
    if spoiled:
        sentence = f"Mistrust these figures ({', '.join(spoiled)}). {sentence}"
    return Headline(sentence, [predicted, *_curved(own, lr), *([measured] if measured else [])], findings)


def per(results: EntropyInfluenceResults) -> str:
    """Return what an entropy is of: ``per token`` or ``per rollout``."""
    return "per token" if results.plan.normalize == "token" else "per rollout"


def step_terms(own: dict[str, Any]) -> list[StepTerm]:
    """Return the parts of the step on one E, in the order of a table; those that are no sum add up to the total."""
    unattributed = own.get("unattributed", 0.0)
    return [
        StepTerm("momentum", own["momentum"], None),
        StepTerm("weight decay", own["weight_decay"], None),
        StepTerm("baseline, both of these", own["baseline"], own.get("baseline_stderr"), "sum"),
        StepTerm("rollouts, all together", own["sum_per_sequence"], own.get("sum_per_sequence_stderr")),
        *([StepTerm("unattributed", unattributed, None)] if unattributed else []),
        StepTerm("total", own["total"], own["total_stderr"], "total"),
    ]


def _sentence(predicted: Change, measured: Change | None, unit: str, entropy: float) -> str:
    now, seen = f"now {entropy:.4f} nats {unit}", "" if measured is None else f", measured {measured.signed}"
    if not predicted.value and (measured is None or not measured.value):
        return f"To first order this step leaves the policy's entropy as it is, at {entropy:.4f} nats {unit}."
    if predicted.sign is None:
        return (
            f"E does not tell whether this step raises or lowers the policy's entropy, {now}: to first order it "
            f"changes by {predicted.signed} nats{seen}."
        )
    if measured is not None and measured.sign is None:
        return (
            f"The sign is not sure: to first order this step {_verb(predicted)} the policy's entropy, {now}, by "
            f"{predicted.size} nats, but {measured.signed} is measured, which E does not tell from zero."
        )
    if measured is not None and measured.sign != predicted.sign:
        return (
            f"This step is too long for the first order: it {_verb(measured)} the policy's entropy, {now}, by "
            f"{measured.size} nats as measured, where {predicted.signed} is predicted."
        )
    also = "" if measured is None else f", by {measured.size} as measured"
    bar = "" if predicted.stderr is not None else "; E gives no error bar"
    return (
        f"This step {_verb(predicted)} the policy's entropy by {predicted.size} nats {unit} to first order{also}, from "
        f"{entropy:.4f}{bar}."
    )


def _verb(change: Change) -> str:
    return "lowers" if change.value < 0 else "raises"


def _curved(own: dict[str, Any], lr: float) -> list[Change]:
    if own.get("second_order") is None or not lr:
        return []
    return [Change("predicted, second order", own["total"] * lr + own["second_order"] * lr**2 / 2, None)]


def _measured(results: EntropyInfluenceResults, evaluation: int) -> Change | None:
    arrays, lr = results.evaluations[evaluation].arrays, results.summary["lr"]
    value, stderr = (value_at_lr(arrays, name, lr) for name in ("full", "full_stderr"))
    if value is None:
        return None
    return Change("measured, importance sampling", value, None if stderr is None or np.isnan(stderr) else stderr)


def _scaled(error: float | None, lr: float) -> float | None:
    return None if error is None else error * lr
