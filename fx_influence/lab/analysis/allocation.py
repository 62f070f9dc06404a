"""Allocations of the baseline, which no rollout of U causes, to the rollouts, and their effect on correlations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from scipy.stats import pearsonr, spearmanr

Allocation = Literal["none", "uniform", "grad_norm", "abs_influence"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)
COVARIATES = ("advantage", "reward", "completion_length", "mean_entropy", "mean_logprob", "gradient_norm")


def allocate(influence: np.ndarray, baseline: float, gradient_norms: np.ndarray, allocation: Allocation) -> np.ndarray:
    """Return delta_i + baseline w_i with weights w_i >= 0 that add up to 1.

    Args:
        influence: (n_u,), nats per unit lr, delta_i.
        baseline: nats per unit lr, the change due to momentum and weight decay.
        gradient_norms: (n_u,), |g_i|.
        allocation: ``none``, delta_i unchanged; ``uniform``, w_i = 1/n_u; ``grad_norm``, w_i = |g_i| / sum |g|;
            ``abs_influence``, w_i = |delta_i| / sum |delta|. Weights that would all be 0 are uniform.

    Returns:
        (n_u,), nats per unit lr.

    Raises:
        ValueError: for another allocation.

    Example:
        >>> allocate(np.array([1.0, -3.0]), 8.0, np.array([1.0, 1.0]), "abs_influence").tolist()
        [3.0, 3.0]
    """
    weights = {"uniform": np.ones_like(influence), "grad_norm": gradient_norms, "abs_influence": np.abs(influence)}
    if allocation == "none":
        return influence
    if allocation not in weights:
        raise ValueError(f"allocation is {allocation!r}; expected one of {', '.join(ALLOCATIONS)}")
    weight = weights[allocation] if weights[allocation].any() else weights["uniform"]
    return influence + baseline * weight / weight.sum()


def allocation_correlations(
    sequences: Sequence[Mapping[str, Any]], influence: np.ndarray, baseline: float
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return Pearson and Spearman correlations of the allocated influence with each covariate, by allocation.

    Args:
        sequences: the run's records of U.
        influence: (n_u,), nats per unit lr.
        baseline: nats per unit lr.

    Returns:
        ``{covariate: {allocation: {"pearson", "spearman"}}}`` for those of ``COVARIATES`` that every record has; None
        where one of the two is constant. Under ``uniform`` nothing can change, whatever the baseline: a check of the
        others.

    Example:
        >>> lengths, norms, delta = (2, 9, 3), (1.0, 9.0, 1.0), np.array([1.0, -3.0, 0.5])
        >>> records = [dict(zip(("completion_length", "gradient_norm"), values)) for values in zip(lengths, norms)]
        >>> by_allocation = allocation_correlations(records, delta, 8.0)["completion_length"]
        >>> {name: round(value["spearman"], 3) for name, value in by_allocation.items()}
        {'none': -1.0, 'uniform': -1.0, 'grad_norm': 0.5, 'abs_influence': -0.5}
    """
    norms = np.array([r["gradient_norm"] for r in sequences])
    allocated = {name: allocate(influence, baseline, norms, name) for name in ALLOCATIONS}
    known = [name for name in COVARIATES if all(r.get(name) is not None for r in sequences)]
    covariates = {name: np.array([float(r[name]) for r in sequences]) for name in known}
    return {
        name: {allocation: _correlation(values, covariate) for allocation, values in allocated.items()}
        for name, covariate in covariates.items()
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> dict[str, float | None]:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"pearson": None, "spearman": None}
    return {"pearson": float(pearsonr(a, b).statistic), "spearman": float(spearmanr(a, b).statistic)}
