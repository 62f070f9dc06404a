"""Say in three sentences what happened to a training run's entropy, what did it, and how far to trust both."""

from __future__ import annotations

import math

import numpy as np

from fx_influence.interop.ledger.file import STEP
from fx_influence.lab.console.numbers import with_error
from fx_influence.lab.health import INVALIDATING, Finding
from fx_influence.lab.training.account import Account, LabelSum, Term, account, label_sums
from fx_influence.lab.training.health import training_health
from fx_influence.lab.training.load import Training

SMALL = 0.02
"""Share of the sizes of the terms below which a term is not named in the sentence."""

MOST = 0.5
"""Share of the squared error above which the sentence names the step that has it."""

PHRASES = {
    "A>0 likely": "likely tokens with a positive advantage",
    "A>0 unlikely": "unlikely tokens with a positive advantage",
    "A<0 likely": "likely tokens with a negative advantage",
    "A<0 unlikely": "unlikely tokens with a negative advantage",
    "A=0": "tokens with an advantage of 0",
}
"""Regions of tokens as a sentence names them."""


def training_sentences(training: Training, findings: list[Finding] | None = None) -> list[str]:
    """Return three sentences. A direction is named only where the error bars determine it.

    Args:
        training: from ``load_training``.
        findings: of ``training_health``; None computes them.
    """
    findings = training_health(training) if findings is None else findings
    if not training.splits_the_step:
        name = training.settings["preconditioner"]
        first = (
            f"The {steps_measured(training)} of this run were attributed with the preconditioner {name!r}, whose "
            "influences are not the terms of the steps that were made: there is no account beside the measured change."
        )
        return [_with_doubt(first, findings), _of_kinds(training), _trust(findings)]
    summed = account(training)
    return [_with_doubt(_change(training, summed), findings), _terms(training, summed), _unexplained(summed, findings)]


def steps_measured(training: Training) -> str:
    """Return how many steps are measured, and their share where it is not all of them."""
    count, last = len(training.steps[STEP]), training.last_step
    if count == last:
        return f"{count} measured steps"
    return f"{count} measured steps of {last} ({training.coverage:.0%})"


def entropy_unit(training: Training) -> str:
    """Return what the entropies refer to: ``per token`` or ``per rollout``."""
    return "per token" if training.settings.get("normalize", "token") == "token" else "per rollout"


def signed(term: Term, beside: float = math.nan) -> str:
    """Return a sum with its sign and, where it is known, its standard error.

    Args:
        term: the sum.
        beside: a standard error to whose decimals a sum without one is rounded.
    """
    size, sign = abs(term.value), "−" if term.value < 0 else "+"
    if math.isnan(term.stderr) and beside > 0:
        # More digits would look surer than the sums that it stands beside.
        return sign + with_error(size, beside).partition(" ±")[0]
    return sign + _size(term)


def phrase(label: LabelSum) -> str:
    """Return a label as a sentence names it."""
    return PHRASES.get(label.term.name, f"{label.kind} “{label.term.name}”")


def _with_doubt(sentence: str, findings: list[Finding]) -> str:
    failed = [finding.name for finding in findings if finding.level == "attention" and finding.name in INVALIDATING]
    return f"Do not trust these figures ({', '.join(failed)}). {sentence}" if failed else sentence


def _change(training: Training, summed: Account) -> str:
    """Return the sentence on the measured and the predicted change."""
    measured, predicted, unit = summed.measured, summed.predicted, entropy_unit(training)
    steps = steps_measured(training)
    if not measured.sign:
        return (
            f"The error bars do not tell whether the {steps} raised or lowered the policy's entropy: it changed by "
            f"{signed(measured)} nats {unit} as measured, {signed(predicted)} as predicted to first order."
            f"{_noisiest_step(training, training.steps['measured_stderr'])}"
        )
    size, verb = _size(measured), _moved(measured)
    if predicted.sign == -measured.sign:
        return (
            f"The first order does not hold over this run: the {steps} {verb} the policy's entropy by {size} nats "
            f"{unit} as measured, where {signed(predicted)} is predicted."
        )
    doubt = "" if predicted.sign else ", a sign that its error bar does not tell"
    noisiest = "" if predicted.sign else _noisiest_step(training, training.steps["stderr"])
    return (
        f"The {steps} {verb} the policy's entropy by {size} nats {unit} as measured; {signed(predicted)} is predicted "
        f"to first order{doubt}.{noisiest}"
    )


def _noisiest_step(training: Training, stderr: np.ndarray) -> str:
    """Return a sentence on the step without which a sum might be told, if most of the squared error (S,) is its."""
    squares = np.square(stderr)
    total = float(np.nansum(squares))
    if len(squares) < 2 or not total > 0:
        return ""
    noisiest = int(np.nanargmax(squares))
    share = float(squares[noisiest]) / total
    return f" Step {training.steps[STEP][noisiest]} alone has {share:.0%} of the squared error." if share > MOST else ""


def _terms(training: Training, summed: Account) -> str:
    """Return the sentence on the terms of the predicted change and the kind of token that moves it most."""
    size = sum(abs(term.value) for term in summed.terms)
    named = [term for term in summed.terms if abs(term.value) > SMALL * size]
    if not named:
        return "No term of the predicted change differs from 0."
    words = {
        "momentum": "came through momentum (the rollouts of earlier steps)",
        "rollouts": "from the rollouts of the measured steps themselves",
        "weight decay": "from weight decay",
        "unattributed": "from what the gradient holds beyond the rollouts",
    }
    order = sorted(named, key=lambda term: (term.name != "momentum", -abs(term.value)))
    beside = summed.predicted.stderr
    parts = [f"{signed(term, beside)} {words.get(term.name, f'from the {term.name}')}" for term in order]
    if order[0].name != "momentum":
        parts[0] = parts[0].replace(" from", " came from", 1)
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"Of the predicted change {listed}; {_clause(_of_kinds(training))}"


def _of_kinds(training: Training) -> str:
    """Return a sentence on the regions of tokens, or where there are none on another kind, that move it most."""
    if not training.kinds:
        return "The ledger has no kinds of rollouts or tokens."
    kind = "region" if "region" in training.kinds else training.kinds[-1]
    sums = label_sums(training, kind)
    told = [x for x in sums if x.term.sign]
    if not told:
        return "Of the kinds of tokens none has a sum whose sign the error bars tell."
    larger = "" if told[0] is sums[0] else ", as far as the error bars tell"
    # Kinds cancel, so the strongest one alone would not say where the sum comes from.
    opposite = [x for x in told if x.term.sign != told[0].term.sign][:1]
    parts = [f"{phrase(x)} {_moved(x.term)} it most, by {_size(x.term)}" for x in [told[0], *opposite]]
    return f"Among the rollouts{larger and larger + ','} {' and '.join(parts)}."


def _moved(term: Term) -> str:
    return "raised" if term.sign > 0 else "lowered"


def _size(term: Term) -> str:
    return with_error(abs(term.value), _none_if_nan(term.stderr))


def _unexplained(summed: Account, findings: list[Finding]) -> str:
    term = summed.unexplained
    interval = f"with a 95% interval that {'excludes' if term.sign else 'includes'} 0"
    if summed.bounded_steps:
        interval = f"{interval}, from an upper bound of the error"
    if math.isnan(term.stderr):
        interval = "with an error that is not known"
    return f"Unexplained, measured minus predicted, are {signed(term)} nats, {interval}; {_clause(_trust(findings))}"


def _trust(findings: list[Finding]) -> str:
    failed = [finding.name for finding in findings if finding.level == "attention"]
    if failed:
        verb = "needs" if len(failed) == 1 else "need"
        return f"{len(failed)} of {len(findings)} checks {verb} attention: {', '.join(failed)}."
    unknown = [finding.name for finding in findings if finding.level == "unknown"]
    if unknown:
        return f"No check fails; {', '.join(unknown)} could not be decided."
    return f"All {len(findings)} checks pass."


def _clause(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
