"""Does Delta H move linearly in eta, how far, and do the parts add up to the whole?"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

ALLOWED_ERROR = 0.1
"""The first order is trusted as long as it is off by this much at most, relative to itself."""


class LineFit(NamedTuple):
    """Lines through the origin fitted to Delta H against eta, one for each direction; arrays of the shape ``(...)``.

    ``slope``: nats per unit eta. ``r2``: 1 - sum (dH - slope eta)^2 / sum (dH - mean dH)^2, NaN where dH is constant.
    ``slope_at_0``, ``curvature``: s and k of dH = s eta + k eta^2 / 2. ``eta_trust``: 0.2 |s / k|, where by that
    parabola the first order is 10% off. ``spread``: standard deviation over |mean| of the secants dH / eta, 0 on a
    line: how stable the slope is from one eta to the next.
    """

    slope: np.ndarray
    r2: np.ndarray
    slope_at_0: np.ndarray
    curvature: np.ndarray
    eta_trust: np.ndarray
    spread: np.ndarray


def fit_lines(eta: np.ndarray, delta: np.ndarray) -> LineFit:
    """Least squares through the origin, where Delta H is 0 by definition.

    ``eta``: (n_eta,), positive. ``delta``: (n_eta, ...), raw Delta H. The parabola is fitted to the secants dH / eta,
    which weighs every eta alike: sampling moves dH in proportion to eta, since E is the same. With fewer than three
    etas there is no R^2, with fewer than two nothing but a slope: NaN.

    Example:
        >>> fit = fit_lines(np.array([1.0, 2.0, 4.0]), np.array([3.5, 8.0, 20.0]))
        >>> round(float(fit.slope_at_0), 9), round(float(fit.curvature), 9), round(float(fit.eta_trust), 9)
        (3.0, 1.0, 0.6)
    """
    x = eta.reshape(-1, *[1] * (delta.ndim - 1))
    slope, secants = (x * delta).sum(0) / (x * x).sum(), delta / x
    missing = np.full(slope.shape, np.nan)
    if len(eta) < 2:
        return LineFit(slope, missing, missing, missing, missing, missing)
    with np.errstate(divide="ignore", invalid="ignore"):
        off, variation = ((delta - slope * x) ** 2).sum(0), ((delta - delta.mean(0)) ** 2).sum(0)
        centred = x - x.mean()
        half = (centred * secants).sum(0) / (centred * centred).sum()
        start = secants.mean(0) - half * x.mean()
        return LineFit(
            slope=slope,
            r2=np.where(variation > 0, 1 - off / variation, np.nan) if len(eta) > 2 else missing,
            slope_at_0=start,
            curvature=2 * half,
            eta_trust=eta_trust(start, 2 * half),
            spread=np.where(secants.any(0), secants.std(0) / np.abs(secants.mean(0)), np.nan),
        )


def eta_trust(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The eta at which first + second eta / 2 is 10% off ``first``: 0.2 |first / second|; NaN where both are 0.

    Example:
        >>> eta_trust(np.array([3.0]), np.array([-2.0])).round(9).tolist()
        [0.3]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return 2 * ALLOWED_ERROR * np.abs(np.asarray(first) / np.asarray(second))


def measured_trust(eta: np.ndarray, delta: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The largest swept eta up to which Delta H stays within 10% of eta times ``first``; 0 where none does.

    ``eta``: (n_eta,), in any order. ``delta``: (n_eta, ...). ``first``: (...), the derivative at 0.

    Example:
        >>> measured_trust(np.array([4.0, 1.0, 2.0]), np.array([9.0, 1.05, 2.1]), np.array(1.0)).item()
        2.0
    """
    order = np.argsort(eta)
    x = eta[order].reshape(-1, *[1] * (delta.ndim - 1))
    good = np.abs(delta[order] - x * first) <= ALLOWED_ERROR * np.abs(x * first)
    return np.asarray(np.where(np.logical_and.accumulate(good, axis=0), x, 0.0).max(0))


def additivity_gap(full: np.ndarray, baseline: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """|dH_full - (dH_baseline + sum_i dH_i)| / |dH_full| at each eta, (n_eta,): what the parts miss of the whole.

    ``full``, ``baseline``: (n_eta,). ``grad``: (n_eta, n_u), along each v_i alone.

    Example:
        >>> additivity_gap(np.array([2.0]), np.array([0.5]), np.array([[1.0, 0.25]])).tolist()
        [0.125]
    """
    return np.abs(full - (baseline + grad.sum(1))) / np.abs(full)


class Agreement(NamedTuple):
    """SNIS slopes of the rollouts against the JVP's; over rollouts that move anything.

    ``spearman``: rank correlation. ``max_error``: max |slope - first| / max |first|. ``max_relative_error``: the
    largest |slope_i - first_i| / |first_i|. ``rollouts``: how many.
    """

    spearman: float
    max_error: float
    max_relative_error: float
    rollouts: int


def agreement(eta: np.ndarray, delta: np.ndarray, first: np.ndarray, trust: np.ndarray) -> Agreement:
    """Each rollout's secant dH / eta at the largest swept eta that ``trust`` (n_u,) allows it, beside ``first`` (n_u,).

    Where every swept eta is larger than that, the smallest stands in.

    Example:
        >>> eta, first = np.array([1.0, 10.0]), np.array([2.0, -1.0])
        >>> found = agreement(eta, np.array([[2.1, -1.0], [0.0, -10.5]]), first, np.array([5.0, 20.0]))
        >>> round(found.max_error, 9)
        0.05
    """
    allowed = np.where(eta[:, None] <= trust, eta[:, None], -np.inf)
    chosen = np.where(np.isfinite(allowed.max(0)), allowed.argmax(0), eta.argmin())
    moving = first != 0
    slope = (np.take_along_axis(delta, chosen[None], 0)[0] / eta[chosen])[moving]
    off = np.abs(slope - first[moving])
    return Agreement(
        spearman=float(spearmanr(slope, first[moving]).statistic) if moving.sum() > 1 else float("nan"),
        max_error=float(off.max() / np.abs(first).max()) if moving.any() else 0.0,
        max_relative_error=float((off / np.abs(first[moving])).max()) if moving.any() else 0.0,
        rollouts=int(moving.sum()),
    )


def steadier(alone: LineFit, beside: LineFit) -> dict[str, Any]:
    """Which measures a rollout's part more stably: v_i alone, or v_baseline + v_i less v_baseline.

    Both have the same slope at 0. The steadier one of a rollout has the smaller ``spread`` of its secants; the verdict
    goes to the one that is steadier for more rollouts.

    Example:
        >>> eta = np.array([1.0, 2.0, 4.0])[:, None]
        >>> line, bent = fit_lines(eta[:, 0], eta * [1.0, 2.0]), fit_lines(eta[:, 0], eta * [1.0, 2.0] + eta**2)
        >>> steadier(line, bent)["verdict"], steadier(line, bent)["grad_wins"]
        ('grad', 2)
    """
    known = np.isfinite(alone.spread) & np.isfinite(beside.spread)
    wins, losses = (
        int(w.sum()) for w in (alone.spread[known] < beside.spread[known], alone.spread[known] > beside.spread[known])
    )
    return {
        "verdict": "grad" if wins > losses else "baseline_plus_grad" if losses > wins else "neither",
        "grad_wins": wins,
        "baseline_plus_grad_wins": losses,
        "grad_median_spread": float(np.median(alone.spread[known])) if known.any() else None,
        "baseline_plus_grad_median_spread": float(np.median(beside.spread[known])) if known.any() else None,
    }
