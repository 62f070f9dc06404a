"""Add a training run's measured steps up: the account of its entropy, and sums over kinds with error bars."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fx_influence.estimators.stderr import degrees_of_sum, interval_half_width
from fx_influence.interop.ledger.entry import ASSUMED_DEGREES, DEGREES, MEASURED_DEGREES
from fx_influence.interop.ledger.file import STEP
from fx_influence.lab.training.load import Training

TERMS = ("rollouts", "momentum", "weight_decay", "unattributed")
"""Columns of a training run's steps that add up to ``total``, but for a denominator that responds to the gradient."""

SOURCE_KIND = "source"
"""Kind of the labels that are data sources or environments."""

ROUNDING = 1e-6
"""Share of the sizes of the terms below which what they leave is their rounding."""

EVERYTHING = 0.999
"""Mean share of the sum of |influence| above which a label is no kind among others."""


class Term(NamedTuple):
    """A sum over measured steps: nats, its standard error over the draws of E, and the degrees of freedom of that.

    Both are NaN where they are not known.
    """

    name: str
    value: float
    stderr: float
    degrees_of_freedom: float

    @property
    def sign(self) -> int:
        """Return -1 or 1 if the 95% interval does not include 0, else 0: the sign is not told."""
        return int(np.sign(self.value)) if abs(self.value) > self.half_width else 0

    @property
    def half_width(self) -> float:
        """Return the half-width of the 95% interval."""
        return interval_half_width(self.stderr, self.degrees_of_freedom)


class Account(NamedTuple):
    """The measured change of entropy, and what it is made of.

    Attributes:
        measured: sum of the changes measured after the steps.
        predicted: sum of the changes to first order: the sum of ``terms``.
        terms: rollouts, momentum, weight decay, unattributed and, where the preconditioner has it, the response of the
            denominator.
        unexplained: measured - predicted, with the standard error of the difference: both are on the same rollouts, so
            that most of their errors cancel.
        bounded_steps: measured steps whose error of the difference is not known, as in ledgers of older versions. It is
            bounded by those of both as if they were independent.
        num_steps: measured steps that are added up.
        coverage: their share of the run's steps up to the last measured one.
        factor: by which all sums are multiplied, 1 unless they were to be scaled.
    """

    measured: Term
    predicted: Term
    terms: list[Term]
    unexplained: Term
    bounded_steps: int
    num_steps: int
    coverage: float
    factor: float


class Lifetime(NamedTuple):
    """The rollouts' effects now and through momentum later, beside what rollouts and momentum did.

    Attributes:
        effects: sum over the measured steps of what their rollouts do in their step and, through momentum, in later
            ones, if these were like it.
        realised: sum of the terms rollouts and momentum of the same steps.
        difference: effects - realised, with an upper bound of its standard error, which takes both as independent.
            Momentum that came from before the first step and goes on after the last one is in it, and so are the steps
            that are not measured.
    """

    effects: Term
    realised: Term
    difference: Term


class LabelSum(NamedTuple):
    """The sum of one label over the measured steps.

    Attributes:
        kind: that the label is one of.
        term: label, nats, standard error.
        members: rollouts or tokens with the label.
        steps: measured steps in which the label occurs.
        share: of the sum of |influence|, the mean over the measured steps.
    """

    kind: str
    term: Term
    members: int
    steps: int
    share: float


class Series(NamedTuple):
    """Values (S,) of one quantity at every measured step, and their standard errors."""

    values: np.ndarray
    stderr: np.ndarray

    def cumulative(self) -> Series:
        """Return the sums up to every step, with the roots of the sums of squared errors."""
        return Series(self.values.cumsum(), np.sqrt(np.square(self.stderr).cumsum()))

    def summed(self, name: str, degrees_of_freedom: np.ndarray, factor: float = 1.0) -> Term:
        """Return the sum over the steps, of errors that are independent and have these degrees of freedom, (S,)."""
        error = factor * float(np.sqrt(np.square(self.stderr).sum()))
        return Term(name, factor * float(self.values.sum()), error, degrees_of_sum(self.stderr, degrees_of_freedom))


def account(training: Training, scale: bool = False) -> Account:
    """Return the account of a training run's entropy over its measured steps.

    E is drawn independently in every step, so standard errors of sums are roots of sums of squares, with the degrees of
    freedom of ``degrees_of_sum``. With held-out prompts, the same in every step, they are over the completions and not
    over the choice of prompts. Steps without a measured change, which the optimizer skipped, are left out.

    Args:
        training: from ``load_training``.
        scale: whether to multiply sums and errors by the run's steps over the measured ones, as if the others were
            like these. The errors do not include that they may not be.

    Raises:
        ValueError: for a preconditioner whose total is not the step's, and where no step has a measured change.
    """
    if not training.splits_the_step:
        raise ValueError(
            f"preconditioner is {training.settings['preconditioner']!r}; expected 'frozen' or 'jacobian', under which "
            "the influences add up to the step. Read the sums over kinds, by label_sums"
        )
    columns = training.steps
    rows = np.isfinite(columns["measured"]) & np.isfinite(columns["total"])
    if not rows.any():
        raise ValueError("measured is unknown in every step; expected one that the optimizer made. Measure more steps")
    coverage = int(rows.sum()) / training.last_step
    factor = 1 / coverage if scale else 1.0
    degrees, measured_degrees = degrees_of_freedom(training), measured_degrees_of_freedom(training)

    def term(name: str, values: np.ndarray, stderr: np.ndarray, degrees: np.ndarray = degrees) -> Term:
        return Series(values[rows], stderr[rows]).summed(name, degrees[rows], factor)

    unknown = np.full(len(rows), np.nan)
    measured = term("measured", columns["measured"], columns["measured_stderr"], measured_degrees)
    predicted = term("predicted", columns["total"], columns["stderr"])
    errors = {"rollouts": columns["rollouts_stderr"]}
    terms = [term(name.replace("_", " "), columns[name], errors.get(name, unknown)) for name in TERMS]
    rest = predicted.value - sum(x.value for x in terms)
    if abs(rest) > ROUNDING * sum(abs(x.value) for x in terms):
        terms.append(Term("response of the denominator", rest, float("nan"), float("nan")))
    unexplained = term("unexplained", columns["measured"] - columns["total"], unexplained_stderr(training))
    bounded = int(np.isnan(columns["unexplained_stderr"][rows]).sum())
    return Account(measured, predicted, terms, unexplained, bounded, int(rows.sum()), coverage, factor)


def unexplained_stderr(training: Training) -> np.ndarray:
    """Return the standard error of measured - predicted at every step, (S,), or where it is not known a bound of it.

    The bound takes the errors of the two as independent; NaN where those are not known either.
    """
    columns = training.steps
    known = columns["unexplained_stderr"]
    return np.where(np.isnan(known), np.hypot(columns["measured_stderr"], columns["stderr"]), known)


def degrees_of_freedom(training: Training) -> np.ndarray:
    """Return those of the standard errors of influences and their sums at every step, (S,), six where not stored."""
    return _or_assumed(training.steps[DEGREES])


def measured_degrees_of_freedom(training: Training) -> np.ndarray:
    """Return those of the standard errors of the measured changes at every step, (S,), six where not stored."""
    return _or_assumed(training.steps[MEASURED_DEGREES])


def _or_assumed(degrees: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(degrees), ASSUMED_DEGREES, degrees)


def lifetime(training: Training) -> Lifetime | None:
    """Return how well the rollouts' effects over their lifetimes account for rollouts and momentum over the run.

    Args:
        training: from ``load_training``.

    Returns:
        None where a step has no lifetime effects: measured with another preconditioner than ``frozen``, or with
        parameters that differ in beta1 or in the number of their updates.
    """
    columns = training.steps
    factor, degrees = columns["lifetime_factor"], degrees_of_freedom(training)
    if not np.isfinite(factor).all():
        return None
    scaled = Series(factor * columns["rollouts"], factor * columns["rollouts_stderr"])
    effects = scaled.summed("lifetime effects", degrees)
    # The error of the complete step stands for that of these two terms, which nearly always are all of it.
    of_step = Series(columns["rollouts"] + columns["momentum"], columns["stderr"])
    realised = of_step.summed("rollouts and momentum", degrees)
    both = [np.array([getattr(x, name) for x in (effects, realised)]) for name in ("stderr", "degrees_of_freedom")]
    difference = Series(np.array([effects.value, -realised.value]), both[0]).summed("difference", both[1])
    return Lifetime(effects, realised, difference)


def label_series(training: Training, kind: str, over_lifetime: bool = False) -> dict[str, Series]:
    """Return the sum and standard error of each label of a kind at every measured step, 0 where it does not occur.

    Args:
        training: from ``load_training``.
        kind: one of ``training.kinds``.
        over_lifetime: whether to take the effects in this and, through momentum, in later steps; NaN where a step has
            none, see ``lifetime``.

    Returns:
        By label, the one whose sum over the run is largest in size first.

    Raises:
        ValueError: for a kind that the ledger does not have.
    """
    if kind not in training.kinds:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(training.kinds)}. Choose one of these")
    columns = training.labels
    rows = columns["kind"] == kind
    place = np.searchsorted(training.steps[STEP], columns[STEP][rows])
    factor = training.steps["lifetime_factor"][place] if over_lifetime else np.ones(len(place))
    series: dict[str, Series] = {}
    for label in dict.fromkeys(columns["label"][rows].tolist()):
        chosen = columns["label"][rows] == label
        values, stderr = np.zeros((2, len(training.steps[STEP])))
        values[place[chosen]] = (factor * columns["influence"][rows])[chosen]
        stderr[place[chosen]] = (factor * columns["stderr"][rows])[chosen]
        series[label] = Series(values, stderr)
    return dict(sorted(series.items(), key=lambda item: -abs(item[1].values.sum())))


def label_sums(training: Training, kind: str, scale: bool = False, over_lifetime: bool = False) -> list[LabelSum]:
    """Return the sums of a kind's labels over the measured steps, the largest in size first.

    Args:
        training: from ``load_training``.
        kind: one of ``training.kinds``.
        scale: as for ``account``.
        over_lifetime: as for ``label_series``.

    Raises:
        ValueError: for a kind that the ledger does not have.
    """
    factor = 1 / training.coverage if scale else 1.0
    columns, degrees, sums = training.labels, degrees_of_freedom(training), []
    for label, series in label_series(training, kind, over_lifetime).items():
        rows = (columns["kind"] == kind) & (columns["label"] == label)
        term = series.summed(label, degrees, factor)
        share = float(np.nansum(columns["share"][rows])) / len(training.steps[STEP])
        sums.append(LabelSum(kind, term, int(columns["count"][rows].sum()), int(rows.sum()), share))
    return sums


def strongest_labels(training: Training) -> list[LabelSum]:
    """Return the labels of all kinds but sources that are not everything: those whose sign is told first, by size."""
    kinds = [kind for kind in training.kinds if kind != SOURCE_KIND]
    sums = [x for kind in kinds for x in label_sums(training, kind) if x.share < EVERYTHING and x.term.value]
    return sorted(sums, key=lambda x: (x.term.sign == 0, -abs(x.term.value)))


def causes(training: Training, kind: str | None = None) -> dict[str, np.ndarray]:
    """Return the terms of the predicted change at every measured step, (S,), by name; they add up to ``total``.

    Args:
        training: from ``load_training``.
        kind: by whose labels the rollouts are divided; None takes the regions of tokens, or else leaves them one.

    Raises:
        ValueError: as ``label_series`` does.
    """
    columns = training.steps
    if kind is None and "region" in training.kinds:
        kind = "region"
    parts = {name.replace("_", " "): np.nan_to_num(columns[name]) for name in TERMS[1:]}
    rollouts = np.nan_to_num(columns["rollouts"])
    if kind is not None:
        labelled = {name: np.nan_to_num(x.values) for name, x in label_series(training, kind).items()}
        parts |= labelled
        rollouts = rollouts - sum(labelled.values())
    parts["rollouts" if kind is None else "other rollouts"] = rollouts
    parts["rest"] = np.nan_to_num(columns["total"]) - sum(parts.values())
    size = sum(float(np.abs(x).sum()) for x in parts.values())
    return {name: x for name, x in parts.items() if float(np.abs(x).sum()) > ROUNDING * size}
