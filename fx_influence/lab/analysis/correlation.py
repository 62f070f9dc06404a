"""Correlations with intervals over the draw of prompts, p-values and their correction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import false_discovery_control
from scipy.stats import t as student

RESAMPLES = 2000
CONFIDENCE = 0.95
BLOCK = 2**24
"""Numbers that a block of resamples holds at once."""
NEGLIGIBLE = 1e-12
"""Variance of standardised values, or of what advantage leaves of them, that is rounding."""

Column = np.ndarray | str
"""Values (n,), or the reason why there are none."""
Row = dict[str, Any]


class Correlations(NamedTuple):
    """Correlation matrices (..., v, v) of v variables, NaN where one of two is constant."""

    pearson: np.ndarray
    spearman: np.ndarray


def cluster_index(clusters: np.ndarray) -> np.ndarray:
    """Return the cluster of each row as a number from 0 to C-1, in the order of the sorted labels; (n,)."""
    return np.unique(clusters, return_inverse=True)[1]


def cluster_counts(clusters: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each of C clusters is drawn when C are drawn with replacement; (resamples, C).

    ``clusters``: (n,), the cluster of each row, 0 to C-1. The same seed gives the same draws.

    Example:
        >>> cluster_counts(np.array([0, 0, 1, 2]), resamples=5).sum(1).tolist()
        [3.0, 3.0, 3.0, 3.0, 3.0]
    """
    count = int(clusters.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.asarray(draws, dtype=float)


def correlations(variables: np.ndarray, weights: np.ndarray) -> Correlations:
    """Pearson and Spearman correlations of rows that occur ``weights`` times, for many weightings at once.

    ``variables``: (v, n). ``weights``: (B, n), at least 0, such as 1 for the sample itself or how often a bootstrap
    drew each row. Ranks are made anew in every weighting, ties share the middle one. Returns (B, v, v).
    Source: Spearman's rho is Pearson's of midranks, Kendall 1970.

    Example:
        >>> x = np.array([[1.0, 2.0, 3.0, 9.0], [1.0, 2.0, 4.0, 3.0]])
        >>> round(correlations(x, np.ones((1, 4))).spearman[0, 0, 1].item(), 6)
        0.8
    """
    weights = weights / weights.sum(1, keepdims=True)
    centred = variables - variables.mean(1, keepdims=True)
    scaled = centred / np.where(np.ptp(variables, 1), centred.std(1), 1.0)[:, None]
    second = np.stack([weights @ (scaled * one).T for one in scaled], 1)
    ranks = np.stack([_midranks(x, weights) for x in variables], 1)
    of_ranks = (weights[:, None] * ranks) @ ranks.swapaxes(1, 2)
    return Correlations(_scaled(second, weights @ scaled.T), _scaled(of_ranks, np.einsum("bn,bvn->bv", weights, ranks)))


def _midranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ranks in units of the whole weight, centred at 0."""
    order = np.argsort(values, kind="stable")
    first = np.concatenate([[True], np.diff(values[order]) != 0])
    starts, inverse = np.flatnonzero(first), np.empty(len(values), dtype=int)
    inverse[order] = np.cumsum(first) - 1
    each = np.add.reduceat(weights[:, order], starts, axis=1)
    return np.asarray((each.cumsum(1) - 0.5 * each - 0.5)[:, inverse])


def _scaled(second: np.ndarray, mean: np.ndarray) -> np.ndarray:
    covariance = second - mean[:, :, None] * mean[:, None, :]
    variance = np.einsum("bvv->bv", covariance).copy()
    variance[variance < NEGLIGIBLE] = np.nan
    deviation = np.sqrt(variance)
    return np.clip(covariance / (deviation[:, :, None] * deviation[:, None, :]), -1.0, 1.0)


def partial(matrix: np.ndarray, x: int, y: int, given: int) -> np.ndarray:
    """Correlation of x and y at fixed ``given``; (...,) of (..., v, v); NaN where ``given`` determines one of the two.

    (r_xy - r_xg r_yg) / sqrt((1 - r_xg^2)(1 - r_yg^2)), of ranks where the matrix is Spearman's.

    Example:
        >>> matrix = np.array([[1.0, 0.5, 0.6], [0.5, 1.0, 0.8], [0.6, 0.8, 1.0]])
        >>> round(partial(matrix, 0, 1, given=2).item(), 6)
        0.041667
    """
    r_xg, r_yg = matrix[..., x, given], matrix[..., y, given]
    left = (1 - r_xg**2) * (1 - r_yg**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (matrix[..., x, y] - r_xg * r_yg) / np.sqrt(left)
    return np.where(left > NEGLIGIBLE, np.clip(found, -1.0, 1.0), np.nan)


def bootstrap(variables: np.ndarray, clusters: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Correlations:
    """``correlations`` in every resample of the clusters, (resamples, v, v); (0, v, v) for a single cluster."""
    v, n = variables.shape
    counts = cluster_counts(clusters, resamples if clusters.max() else 0, seed)
    empty = Correlations(*[np.zeros((0, v, v))] * 2)
    parts = [empty, *(correlations(variables, block[:, clusters]) for block in _blocks(counts, v * n))]
    return Correlations(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def _blocks(counts: np.ndarray, size: int) -> Iterator[np.ndarray]:
    step = max(1, BLOCK // size)
    return (counts[k : k + step] for k in range(0, len(counts), step))


def correlation_rows(
    targets: Mapping[str, Column],
    covariates: Mapping[str, Column],
    clusters: np.ndarray,
    given: str | None = None,
    measures: Sequence[str] = ("pearson", "spearman"),
) -> list[Row]:
    """A row for each target, covariate and measure, with its percentile interval and p-value; q is left to ``adjust``.

    ``measures``: of ``pearson``, ``spearman``, and the two with ``partial_`` before them, at fixed ``given``, a
    covariate. The p-value is of z = atanh(r) over its bootstrap standard error, Student's t with C-1 degrees of
    freedom: rollouts of one prompt are no independent draws, as scipy's own p-values would have them.
    Fields: ``influence``, ``with``, ``measure``, ``value``, ``low``, ``high``, ``p``, ``n``, ``clusters``, ``note``.
    What is constant or missing has None and a note that begins with "not defined".
    """
    pool = _Pool(targets, covariates, clusters)
    size = {"n": len(clusters), "clusters": int(clusters.max()) + 1}
    return [
        {
            "influence": target,
            "with": covariate,
            "measure": measure,
            **pool.estimate(target, covariate, measure, given),
            **size,
        }
        for target in targets
        for covariate in covariates
        for measure in measures
    ]


class _Pool:
    """All variables that vary, their correlations, and those of the resamples, computed once for all pairs."""

    def __init__(self, targets: Mapping[str, Column], covariates: Mapping[str, Column], clusters: np.ndarray) -> None:
        columns = {("influence", name): values for name, values in targets.items()}
        columns |= {("with", name): values for name, values in covariates.items()}
        self._why = {key: reason for key, values in columns.items() if (reason := undefined(values))}
        self._index = {key: k for k, key in enumerate(key for key in columns if key not in self._why)}
        self._clusters = int(clusters.max()) + 1
        if self._index:
            variables = np.stack([np.asarray(columns[key], dtype=float) for key in self._index])
            self._whole = correlations(variables, np.ones((1, len(clusters))))
            self._drawn = bootstrap(variables, clusters)

    def estimate(self, target: str, covariate: str, measure: str, given: str | None) -> Row:
        kind = measure.removeprefix("partial_")
        needed = [("influence", target), ("with", covariate)]
        if kind != measure:
            needed.append(("with", str(given)))
            if covariate == given:
                return nothing(f"not defined: {given} is what is held fixed")
        for key in needed:
            if key in self._why:
                what = "the influence" if key[0] == "influence" else key[1]
                return nothing(f"not defined: {what} {self._why[key]}")
        at = [self._index[key] for key in needed]
        value, draws = (_entry(getattr(m, kind), at) for m in (self._whole, self._drawn))
        return estimate(float(value[0]), draws, self._clusters)


def _entry(matrix: np.ndarray, at: list[int]) -> np.ndarray:
    return np.asarray(matrix[:, at[0], at[1]]) if len(at) == 2 else partial(matrix, *at)


def undefined(values: Column) -> str:
    """Why a column has no correlation, or an empty string."""
    if isinstance(values, str):
        return values
    if len(values) < 3:
        return "has fewer than 3 values"
    return f"is constant, {values[0]:g}" if np.ptp(values) == 0 else ""


def nothing(reason: str) -> Row:
    return {"value": None, "low": None, "high": None, "p": None, "note": reason}


def estimate(value: float, draws: np.ndarray, clusters: int) -> Row:
    """A correlation with its interval and p-value from its values in resamples; None where they say nothing."""
    if np.isnan(value):
        return nothing("not defined: determined by what is held fixed")
    known = draws[~np.isnan(draws)]
    row = {**nothing(""), "value": value}
    if len(known) < max(2, len(draws) / 2):
        return {**row, "note": "no interval: " + ("constant in most resamples" if len(draws) else "a single prompt")}
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    edge = 1 - NEGLIGIBLE
    z, deviation = np.arctanh(np.clip(value, -edge, edge)), np.arctanh(np.clip(known, -edge, edge)).std(ddof=1)
    p = 2 * student.sf(abs(z) / deviation, clusters - 1) if deviation > 0 else float(z == 0)
    return {**row, "low": float(low), "high": float(high), "p": float(p)}


def adjust(rows: list[Row]) -> list[Row]:
    """The rows with ``q`` behind ``p``: the false discovery rate, Benjamini and Hochberg 1995, over all of them.

    It is not stricter for a family that says one thing several times over, as the allocations of a baseline do;
    Holm's correction would be.
    """
    known = [row["p"] for row in rows if row["p"] is not None]
    adjusted = iter(false_discovery_control(known).tolist() if known else [])
    found = []
    for row in rows:
        q = None if row["p"] is None else next(adjusted)
        head = {name: row[name] for name in row if name not in ("n", "clusters", "note")}
        found.append({**head, "q": q, **{name: row[name] for name in ("n", "clusters", "note")}})
    return found
