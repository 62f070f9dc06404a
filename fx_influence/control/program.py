"""Weights of kinds that hold the entropy at the most reward, by linear programs with error bars."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.stats import chi2, f
from torch import Tensor

from fx_influence.control.state import ControlState
from fx_influence.control.sums import KindSums
from fx_influence.core.checks import check_number
from fx_influence.core.display import record_line

TOLERANCE = 1e-6
"""Largest violation of an error bar, and the price of moving a weight from 1, in units of the largest influence."""

MAX_CUTS = 400
"""Linear programs for one solution; ten kinds take some tens."""


class ControlWeights(NamedTuple):
    """Weights by kind, and the mean change of a step predicted with them, per unit lr.

    Attributes:
        kinds: K names.
        weights: w (K,), float64; 1 leaves a kind as it is.
        entropy: rest + sum_k w_k delta_k, nats.
        entropy_bound: ``entropy`` less the error bar of what the weights change, z |w - 1|_C.
        reward: sum_k w_k r_k.
        floor: what ``entropy_bound`` should reach.
        reached: whether it does.
    """

    kinds: tuple[str, ...]
    weights: Tensor
    entropy: float
    entropy_bound: float
    reward: float
    floor: float
    reached: bool

    @property
    def by_kind(self) -> dict[str, float]:
        """Return the weights by name of a kind."""
        return dict(zip(self.kinds, self.weights.tolist(), strict=True))

    def __repr__(self) -> str:
        return record_line(self)


def weights(
    state: ControlState,
    entropy: float,
    target: float,
    *,
    lr: float,
    horizon: float = 10,
    confidence: float = 0.8,
    bounds: tuple[float, float] = (0.0, 1.5),
) -> ControlWeights:
    """Return weights of the kinds that hold the entropy at or above a target at the most reward that is sure.

    With means delta, r and error covariances C, R over the steps so far, d = w - 1, 1 the vector of ones, and
    |x|_C = sqrt(x' C x),

        maximise r'd - z |d|_R
        subject to rest + 1'delta + d'delta - z |d|_C  >=  floor = (target - entropy) / (horizon lr)
        and bounds[0] <= w <= bounds[1],   z^2 = K F(confidence; K, degrees of freedom)

    Scheffe's z makes the error bars hold for all w at once with probability ``confidence``, which they must as w is
    chosen by these very estimates. A weight leaves 1 only where reward or the constraint gains more than the error bar
    of the change: where nothing is significant all are 1. What a step does without weights enters by its estimate:
    the entropy is read anew for every call, so that errors of it average out, while its error bar, which is wider than
    what is missing unless E is large, would ask for more entropy however high the entropy is. The target is a floor,
    which is where reward that is paid in entropy ends; an entropy above it is let fall.

    If no weights reach the floor, those of the largest left side are returned, and ``reached`` is False. Kinds that
    were never measured have weight 1. The error bars are convex: each is the maximum of its tangents, which are added
    where a solution violates it (cutting planes), so that every program is linear.

    The error bars hold the draw of E in the steps so far, not that influences change from step to step, and
    estimates are to first order, with the denominators and the clipping of the weights that were in force.

    Args:
        state: influences over steps, from ``update``.
        entropy: of the policy as it is, nats, in the unit of the influences (per token by default).
        target: nats.
        lr: learning rate of the steps to come.
        horizon: steps in which the entropy should reach the target; more are gentler.
        confidence: of the error bars, from 0 (none) to below 1.
        bounds: of the weights, with 1 between them. A kind at 0 is not measured again, see ``update``.

    Raises:
        ValueError: for numbers out of range.

    Example:
        >>> from fx_influence.control import control_state, update
        >>> sure = torch.zeros(2, 2, dtype=torch.float64)
        >>> delta, r = torch.tensor([[-3.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
        >>> sums = KindSums(("A>0", "A<0"), delta, r, sure, sure, torch.tensor(0.0))
        >>> state = update(control_state(), sums, forgetting=0.9)
        >>> out = weights(state, entropy=1.0, target=0.975, lr=1e-3, horizon=10, bounds=(0.0, 1.0))
        >>> [round(w, 6) for w in out.weights.tolist()]
        [0.5, 1.0]

    Source: Scheffe 1953; cutting planes, Kelley 1960; robust linear programs, Ben-Tal and Nemirovski 1999; HiGHS in
    ``scipy.optimize``.
    """
    _check(entropy, target, lr, horizon, confidence, bounds)
    estimate = state.estimate()
    floor = (target - entropy) / (horizon * lr)
    known = _informative(state.evidence, estimate)
    z = _scheffe(confidence, int(known.sum()), estimate.degrees_of_freedom)
    delta, c, r = (x.numpy() for x in (estimate.entropy, estimate.entropy_covariance, estimate.reward))
    total = float(estimate.rest) + float(delta.sum())
    missing = floor - total
    d = np.zeros(len(known))
    if known.any():
        d[known] = _changes(_known(estimate, known), z, missing, bounds)
    bound = total + float(delta @ d) - z * _norm(c, d)
    slack = 10 * TOLERANCE * (_scale(delta, c) + abs(missing))
    return ControlWeights(
        state.kinds,
        torch.from_numpy(np.clip(1 + d, *bounds)),
        total + float(delta @ d),
        bound,
        float(r.sum() + r @ d),
        floor,
        bool(bound >= floor - slack),
    )


def _informative(evidence: Tensor, estimate: KindSums) -> np.ndarray:
    """Return which kinds were measured and had tokens with coefficients, so that an influence or error is not 0."""
    errors = estimate.entropy_covariance.diagonal() + estimate.reward_covariance.diagonal()
    values: np.ndarray = (estimate.entropy.abs() + estimate.reward.abs() + errors).numpy()
    return (evidence.numpy() > 0) & (values > 0)


def _known(sums: KindSums, known: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return influences and covariances of the kinds that were measured."""
    pairs = np.ix_(known, known)
    delta, r = (x.numpy()[known] for x in (sums.entropy, sums.reward))
    return delta, sums.entropy_covariance.numpy()[pairs], r, sums.reward_covariance.numpy()[pairs]


def _changes(
    problem: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    z: float,
    missing: float,
    bounds: tuple[float, float],
) -> np.ndarray:
    """Return d = w - 1 (K,) of the most reward with the entropy ``missing``, or of the most entropy if none has it."""
    delta, c, r, reward_c = problem
    gain = _Gain(delta / _scale(delta, c), c / _scale(delta, c) ** 2, z)
    reward = _Gain(r / _scale(r, reward_c), reward_c / _scale(r, reward_c) ** 2, z)
    least = missing / _scale(delta, c)
    solution = _solve(reward, gain, least, bounds)
    return _solve(gain, None, 0.0, bounds) if solution is None else solution  # type: ignore[return-value]


class _Gain(NamedTuple):
    """A function of d, mean'd - z |d|_covariance."""

    mean: np.ndarray
    covariance: np.ndarray
    z: float

    def cut(self, d: np.ndarray) -> np.ndarray | None:
        """Return the slope of the error bar at d, None where it is 0."""
        norm = _norm(self.covariance, d)
        return self.covariance @ d / norm if norm > 0 else None


def _solve(objective: _Gain, constraint: _Gain | None, least: float, bounds: tuple[float, float]) -> np.ndarray | None:
    """Return d (K,) of the largest objective with constraint(d) >= least, None if there is none.

    The program is in (up, down, t_objective, t_constraint), d = up - down; each t is at least its error bar's cuts.
    """
    count = len(objective.mean)
    gains = [objective] if constraint is None else [objective, constraint]
    cuts = [[x for k in range(count) if (x := gain.cut(np.eye(count)[k])) is not None] for gain in gains]
    cuts = [[sign * x for x in slopes for sign in (1, -1)] for slopes in cuts]
    box = [(0, bounds[1] - 1)] * count + [(0, 1 - bounds[0])] * count + [(0, None)] * len(gains)
    cost = np.concatenate([TOLERANCE - objective.mean, TOLERANCE + objective.mean, np.zeros(len(gains))])
    cost[2 * count] = objective.z
    d: np.ndarray | None = None
    for _ in range(MAX_CUTS):
        rows = [_cut_row(slope, k, len(gains)) for k, slopes in enumerate(cuts) for slope in slopes]
        limits = [0.0] * len(rows)
        if constraint is not None:
            rows.append(np.concatenate([-constraint.mean, constraint.mean, [0.0, constraint.z]]))
            limits.append(-least)
        options = {"A_ub": np.stack(rows), "b_ub": limits} if rows else {}
        solution = linprog(cost, bounds=box, method="highs", **options)
        if solution.x is None:
            return None
        d = solution.x[:count] - solution.x[count : 2 * count]
        violated = False
        for k, gain in enumerate(gains):
            slope = gain.cut(d)
            if slope is not None and gain.z * (_norm(gain.covariance, d) - solution.x[2 * count + k]) > TOLERANCE:
                cuts[k].append(slope)
                violated = True
        if not violated:
            break
    return d


def _cut_row(slope: np.ndarray, k: int, count: int) -> np.ndarray:
    """Return the row of slope'(up - down) - t_k <= 0."""
    return np.concatenate([slope, -slope, -np.eye(count)[k]])


def _norm(covariance: np.ndarray, d: np.ndarray) -> float:
    return math.sqrt(max(float(d @ covariance @ d), 0.0))


def _scale(mean: np.ndarray, covariance: np.ndarray) -> float:
    """Return the largest influence or standard error, 1 where all are 0."""
    size = max(float(np.abs(mean).max(initial=0.0)), math.sqrt(float(covariance.diagonal().max(initial=0.0))))
    return size or 1.0


def _scheffe(confidence: float, count: int, degrees: float) -> float:
    """Return z such that all combinations of ``count`` means are within z standard errors with this probability."""
    if not count:
        return 0.0
    squared = count * f.ppf(confidence, count, degrees) if math.isfinite(degrees) else chi2.ppf(confidence, count)
    return math.sqrt(squared)


def _check(
    entropy: float, target: float, lr: float, horizon: float, confidence: float, bounds: tuple[float, float]
) -> None:
    finite: Callable[[float], bool] = math.isfinite
    check_number("entropy", entropy, "pass the entropy of the policy as it is", finite, "nats")
    check_number("target", target, "pass the entropy to hold", finite, "nats")
    rate = "pass the learning rate of the steps to come; a step of rate 0 needs no weights"
    check_number("lr", lr, rate, lambda x: 0 < x < math.inf, "a positive number")
    check_number("horizon", horizon, "pass 10", lambda x: 0 < x < math.inf, "a positive number of steps")
    remedy = "pass 0.8, or 0 for no error bars"
    check_number("confidence", confidence, remedy, lambda x: 0 <= x < 1, "a probability below 1")
    if not (len(bounds) == 2 and 0 <= bounds[0] <= 1 <= bounds[1] < math.inf):
        raise ValueError(
            f"bounds is {bounds}; expected two numbers with 0 <= lowest <= 1 <= highest, since 1 leaves a kind as it "
            "is. Pass (0.0, 1.5)"
        )
