"""Linearity of Delta H in eta: fits, the step up to which it holds, agreement with the JVP, additivity."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

ALLOWED_ERROR = 0.1
"""Relative error up to which the first order is trusted."""


class LineFit(NamedTuple):
    """Lines through the origin fitted to Delta H against eta, one for each direction; arrays of the shape ``(...)``.

    ``slope``: nats per unit eta. ``r2``: 1 - sum (dH - slope eta)^2 / sum (dH - mean dH)^2, NaN where dH is constant.
    ``slope_at_0``, ``curvature``: s and k of dH = s eta + k eta^2 / 2. ``eta_trust``: 0.2 |s / k|, where by that
    parabola the first order is 10% off. ``spread``: standard deviation over |mean| of the secants dH / eta, 0 on a
    line; it measures how stable the slope is from one eta to the next.
    """

    slope: np.ndarray
    r2: np.ndarray
    slope_at_0: np.ndarray
    curvature: np.ndarray
    eta_trust: np.ndarray
    spread: np.ndarray


def fit_lines(eta: np.ndarray, delta: np.ndarray) -> LineFit:
    """Fit lines and parabolas by least squares through the origin, where Delta H is 0 by definition.

    The parabola is fitted to the secants dH / eta, which weights every eta equally: the sampling error of dH is
    proportional to eta, since E is the same. With fewer than three etas R^2 is NaN, with fewer than two all but the
    slope is.

    Args:
        eta: (n_eta,), positive.
        delta: (n_eta, ...), nats, raw Delta H.

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
        residual, variation = ((delta - slope * x) ** 2).sum(0), ((delta - delta.mean(0)) ** 2).sum(0)
        centred = x - x.mean()
        half = (centred * secants).sum(0) / (centred * centred).sum()
        start = secants.mean(0) - half * x.mean()
        return LineFit(
            slope=slope,
            r2=np.where(variation > 0, 1 - residual / variation, np.nan) if len(eta) > 2 else missing,
            slope_at_0=start,
            curvature=2 * half,
            eta_trust=eta_trust(start, 2 * half),
            spread=np.where(secants.any(0), secants.std(0) / np.abs(secants.mean(0)), np.nan),
        )


def eta_trust(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the eta at which first + second eta / 2 is 10% off ``first``: 0.2 |first / second|; NaN where both are 0.

    Example:
        >>> eta_trust(np.array([3.0]), np.array([-2.0])).round(9).tolist()
        [0.3]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return 2 * ALLOWED_ERROR * np.abs(np.asarray(first) / np.asarray(second))


def measured_trust(eta: np.ndarray, delta: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return the largest swept eta up to which Delta H stays within 10% of eta times ``first``; 0 where none does.

    Args:
        eta: (n_eta,), in any order.
        delta: (n_eta, ...), nats, raw Delta H.
        first: (...), nats per unit eta, the derivative at 0.

    Returns:
        (...).

    Example:
        >>> measured_trust(np.array([4.0, 1.0, 2.0]), np.array([9.0, 1.05, 2.1]), np.array(1.0)).item()
        2.0
    """
    order = np.argsort(eta)
    x = eta[order].reshape(-1, *[1] * (delta.ndim - 1))
    within = np.abs(delta[order] - x * first) <= ALLOWED_ERROR * np.abs(x * first)
    return np.asarray(np.where(np.logical_and.accumulate(within, axis=0), x, 0.0).max(0))


def additivity_gap(full: np.ndarray, baseline: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """Return |dH_full - (dH_baseline + sum_i dH_i)| / |dH_full|, the relative error of additivity at each eta.

    Args:
        full: (n_eta,), nats, along the whole step.
        baseline: (n_eta,), nats, along momentum and weight decay.
        grad: (n_eta, n_u), nats, along each v_i.

    Returns:
        (n_eta,).

    Example:
        >>> additivity_gap(np.array([2.0]), np.array([0.5]), np.array([[1.0, 0.25]])).tolist()
        [0.125]
    """
    return np.abs(full - (baseline + grad.sum(1))) / np.abs(full)


class Agreement(NamedTuple):
    """Agreement of the rollouts' SNIS slopes with the JVP's, over rollouts whose derivative is not 0.

    ``spearman``: rank correlation. ``max_error``: max |slope - first| / max |first|. ``max_relative_error``: the
    largest |slope_i - first_i| / |first_i|. ``rollouts``: their number.
    """

    spearman: float
    max_error: float
    max_relative_error: float
    rollouts: int


def agreement(eta: np.ndarray, delta: np.ndarray, first: np.ndarray, trust: np.ndarray) -> Agreement:
    """Compare each rollout's secant dH / eta, at its largest trusted eta, with its derivative.

    Args:
        eta: (n_eta,), the swept steps.
        delta: (n_eta, n_u), nats, raw Delta H.
        first: (n_u,), nats per unit eta, by JVP.
        trust: (n_u,), the largest eta to take for each rollout; if all are larger, the smallest is taken.

    Example:
        >>> eta, first = np.array([1.0, 10.0]), np.array([2.0, -1.0])
        >>> result = agreement(eta, np.array([[2.1, -1.0], [0.0, -10.5]]), first, np.array([5.0, 20.0]))
        >>> round(result.max_error, 9)
        0.05
    """
    allowed = np.where(eta[:, None] <= trust, eta[:, None], -np.inf)
    index = np.where(np.isfinite(allowed.max(0)), allowed.argmax(0), eta.argmin())
    nonzero = first != 0
    slope = (np.take_along_axis(delta, index[None], 0)[0] / eta[index])[nonzero]
    error = np.abs(slope - first[nonzero])
    return Agreement(
        spearman=float(spearmanr(slope, first[nonzero]).statistic) if nonzero.sum() > 1 else float("nan"),
        max_error=float(error.max() / np.abs(first).max()) if nonzero.any() else 0.0,
        max_relative_error=float((error / np.abs(first[nonzero])).max()) if nonzero.any() else 0.0,
        rollouts=int(nonzero.sum()),
    )


def compare_stability(grad: LineFit, baseline_plus_grad: LineFit) -> dict[str, Any]:
    """Compare two ways to measure a rollout's Delta H: along v_i, or along v_baseline + v_i minus along v_baseline.

    Both have the same slope at 0. The more stable one of a rollout has the smaller ``spread`` of its secants; the
    verdict is the one that is more stable for more rollouts.

    Args:
        grad: fits along v_i, one for each rollout.
        baseline_plus_grad: fits of the difference.

    Example:
        >>> eta = np.array([1.0, 2.0, 4.0])[:, None]
        >>> line, bent = fit_lines(eta[:, 0], eta * [1.0, 2.0]), fit_lines(eta[:, 0], eta * [1.0, 2.0] + eta**2)
        >>> compare_stability(line, bent)["verdict"], compare_stability(line, bent)["grad_wins"]
        ('grad', 2)
    """
    finite = np.isfinite(grad.spread) & np.isfinite(baseline_plus_grad.spread)
    first, second = grad.spread[finite], baseline_plus_grad.spread[finite]
    wins, losses = int((first < second).sum()), int((first > second).sum())
    return {
        "verdict": "grad" if wins > losses else "baseline_plus_grad" if losses > wins else "neither",
        "grad_wins": wins,
        "baseline_plus_grad_wins": losses,
        "grad_median_spread": float(np.median(first)) if finite.any() else None,
        "baseline_plus_grad_median_spread": float(np.median(second)) if finite.any() else None,
    }
