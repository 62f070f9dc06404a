"""Correlations with intervals over the draw of prompts, p-values and their correction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from einops import einsum
from scipy.stats import false_discovery_control
from scipy.stats import t as student

RESAMPLES = 2000
CONFIDENCE = 0.95
BLOCK = 2**24
"""Largest number of values in memory while resampling."""
MIN_CLUSTERS = 5
"""Prompts below which resamples of them, few and alike, give no interval."""

NEGLIGIBLE = 1e-12
"""Variance of standardised values, or of their residuals at fixed advantage, below which it is rounding."""

Column = np.ndarray | str
"""Values (n,), or the reason why there are none, as the end of a sentence."""
Row = dict[str, Any]


class Correlations(NamedTuple):
    """Correlation matrices (..., v, v) of v variables, NaN where one of two is constant."""

    pearson: np.ndarray
    spearman: np.ndarray


def cluster_index(clusters: np.ndarray) -> np.ndarray:
    """Return the cluster of each row as a number from 0 to C-1, in the order of the sorted labels; (n,)."""
    return np.unique(clusters, return_inverse=True)[1]


def cluster_counts(clusters: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return how often each of C clusters is drawn when C are drawn with replacement.

    Args:
        clusters: (n,), the cluster of each row, 0 to C-1.
        resamples: number of draws.
        seed: the same seed gives the same draws.

    Returns:
        (resamples, C), counts as floats.

    Example:
        >>> cluster_counts(np.array([0, 0, 1, 2]), resamples=5).sum(1).tolist()
        [3.0, 3.0, 3.0, 3.0, 3.0]
    """
    count = int(clusters.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.asarray(draws, dtype=float)


def correlations(variables: np.ndarray, weights: np.ndarray) -> Correlations:
    """Return Pearson and Spearman correlations of rows that occur ``weights`` times, for many weightings at once.

    Ranks are recomputed in every weighting; ties share the middle rank.

    Args:
        variables: (v, n).
        weights: (B, n), at least 0: 1 for the sample itself, or how often a bootstrap drew each row.

    Returns:
        Matrices (B, v, v).

    Source: Spearman's rho is Pearson's of midranks, Kendall 1970.

    Example:
        >>> x = np.array([[1.0, 2.0, 3.0, 9.0], [1.0, 2.0, 4.0, 3.0]])
        >>> round(correlations(x, np.ones((1, 4))).spearman[0, 0, 1].item(), 6)
        0.8
    """
    weights = weights / weights.sum(1, keepdims=True)
    centred = variables - variables.mean(1, keepdims=True)
    scaled = centred / np.where(np.ptp(variables, 1), centred.std(1), 1.0)[:, None]
    moments = np.stack([weights @ (scaled * variable).T for variable in scaled], 1)
    ranks = np.stack([_midranks(x, weights) for x in variables], 1)
    rank_moments = (weights[:, None] * ranks) @ ranks.swapaxes(1, 2)
    rank_means = einsum(weights, ranks, "resample rollout, resample variable rollout -> resample variable")
    return Correlations(_normalised(moments, weights @ scaled.T), _normalised(rank_moments, rank_means))


def _midranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted midranks of (n,) values in units of the total weight, centred at 0; (B, n)."""
    order = np.argsort(values, kind="stable")
    first = np.concatenate([[True], np.diff(values[order]) != 0])
    starts, inverse = np.flatnonzero(first), np.empty(len(values), dtype=int)
    inverse[order] = np.cumsum(first) - 1
    tied = np.add.reduceat(weights[:, order], starts, axis=1)
    return np.asarray((tied.cumsum(1) - 0.5 * tied - 0.5)[:, inverse])


def _normalised(moments: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return correlations from second moments (..., v, v) and means (..., v); NaN where a variance is rounding."""
    covariance = moments - mean[:, :, None] * mean[:, None, :]
    variance = np.einsum("bvv->bv", covariance).copy()
    variance[variance < NEGLIGIBLE] = np.nan
    deviation = np.sqrt(variance)
    return np.clip(covariance / (deviation[:, :, None] * deviation[:, None, :]), -1.0, 1.0)


def partial(matrix: np.ndarray, x: int, y: int, given: int) -> np.ndarray:
    """Return the correlation of x and y at fixed ``given``.

    (r_xy - r_xg r_yg) / sqrt((1 - r_xg^2)(1 - r_yg^2)), of ranks where the matrix is Spearman's.

    Args:
        matrix: (..., v, v), correlations.
        x: index of the first variable.
        y: index of the second.
        given: index of the variable that is fixed.

    Returns:
        (...,); NaN where ``given`` determines one of the two.

    Example:
        >>> matrix = np.array([[1.0, 0.5, 0.6], [0.5, 1.0, 0.8], [0.6, 0.8, 1.0]])
        >>> round(partial(matrix, 0, 1, given=2).item(), 6)
        0.041667
    """
    r_xg, r_yg = matrix[..., x, given], matrix[..., y, given]
    residual = (1 - r_xg**2) * (1 - r_yg**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = (matrix[..., x, y] - r_xg * r_yg) / np.sqrt(residual)
    return np.where(residual > NEGLIGIBLE, np.clip(correlation, -1.0, 1.0), np.nan)


def bootstrap(
    variables: np.ndarray, clusters: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, block: int = BLOCK
) -> Correlations:
    """Return ``correlations`` in every resample of the clusters.

    Args:
        variables: (v, n).
        clusters: (n,), the cluster of each row, 0 to C-1.
        resamples: number of resamples.
        seed: the same seed gives the same resamples.
        block: largest number of values in memory.

    Returns:
        Matrices (resamples, v, v); (0, v, v) for a single cluster.
    """
    v, n = variables.shape
    counts = cluster_counts(clusters, resamples if clusters.max() else 0, seed)
    empty = Correlations(*[np.zeros((0, v, v))] * 2)
    blocks = [
        empty,
        *(correlations(variables, rows[:, clusters]) for rows in _blocks(counts, max(1, block // (v * n)))),
    ]
    return Correlations(*(np.concatenate(field) for field in zip(*blocks, strict=True)))


def _blocks(counts: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    return (counts[k : k + rows] for k in range(0, len(counts), rows))


def correlation_rows(
    targets: Mapping[str, Column],
    covariates: Mapping[str, Column],
    clusters: np.ndarray,
    given: str | None = None,
    measures: Sequence[str] = ("pearson", "spearman"),
) -> list[Row]:
    """Return a row for each target, covariate and measure, with percentile interval and p-value; ``adjust`` adds q.

    The p-value is of z = atanh(r) over its bootstrap standard error, Student's t with C-1 degrees of freedom: rollouts
    of one prompt are not independent draws, which scipy's p-values assume.

    Args:
        targets: columns (n,) of influence, by name.
        covariates: columns (n,), by name.
        clusters: (n,), the cluster of each row, 0 to C-1.
        given: covariate that is fixed in partial correlations.
        measures: some of ``pearson``, ``spearman``, ``partial_pearson`` and ``partial_spearman``.

    Returns:
        Rows with ``influence``, ``with``, ``measure``, ``value``, ``low``, ``high``, ``p``, ``n``, ``clusters``,
        ``note``. A pair of which one is constant or missing has None and a note that begins with "not defined".
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
    """Correlations of all variables that vary, in the sample and in the resamples, computed once for all pairs."""

    def __init__(self, targets: Mapping[str, Column], covariates: Mapping[str, Column], clusters: np.ndarray) -> None:
        columns = {("influence", name): values for name, values in targets.items()}
        columns |= {("with", name): values for name, values in covariates.items()}
        self._undefined = {key: reason for key, values in columns.items() if (reason := undefined(values))}
        self._index = {key: k for k, key in enumerate(key for key in columns if key not in self._undefined)}
        self._clusters = int(clusters.max()) + 1
        if self._index:
            variables = np.stack([np.asarray(columns[key], dtype=float) for key in self._index])
            self._sample = correlations(variables, np.ones((1, len(clusters))))
            self._resamples = bootstrap(variables, clusters)

    def estimate(self, target: str, covariate: str, measure: str, given: str | None) -> Row:
        kind = measure.removeprefix("partial_")
        needed = [("influence", target), ("with", covariate)]
        if kind != measure:
            needed.append(("with", str(given)))
            if covariate == given:
                return undefined_row(f"{given} is the fixed covariate")
        for key in needed:
            if key in self._undefined:
                what = "the influence" if key[0] == "influence" else key[1]
                return undefined_row(f"{what} {self._undefined[key]}")
        index = [self._index[key] for key in needed]
        value, draws = (_entry(getattr(m, kind), index) for m in (self._sample, self._resamples))
        return estimate(float(value[0]), draws, self._clusters)


def _entry(matrix: np.ndarray, index: list[int]) -> np.ndarray:
    return np.asarray(matrix[:, index[0], index[1]]) if len(index) == 2 else partial(matrix, *index)


def undefined(values: Column) -> str:
    """Return why a column has no correlation, as the end of a sentence, or an empty string."""
    if isinstance(values, str):
        return values
    if len(values) < 3:
        return "has fewer than 3 values"
    return f"is constant, {values[0]:g}" if np.ptp(values) == 0 else ""


def undefined_row(reason: str) -> Row:
    """Return the row of a correlation that is not defined, for the reason given."""
    return {**_empty_row(), "note": f"not defined: {reason}"}


def _empty_row() -> Row:
    return {"value": None, "low": None, "high": None, "p": None, "note": ""}


def estimate(value: float, draws: np.ndarray, clusters: int) -> Row:
    """Return a correlation with its interval and p-value; these are None where most resamples are undefined.

    Args:
        value: the correlation in the sample, NaN where it is not defined.
        draws: (resamples,), the correlation in each resample.
        clusters: number of clusters; the p-value has one degree of freedom less.

    Returns:
        A row with ``value``, ``low``, ``high``, ``p``, ``note``.
    """
    if np.isnan(value):
        return undefined_row("determined by the fixed covariate")
    known = draws[~np.isnan(draws)]
    row = {**_empty_row(), "value": value}
    if len(known) < max(2, len(draws) / 2):
        return {**row, "note": "no interval: " + ("constant in most resamples" if len(draws) else "a single prompt")}
    if clusters < MIN_CLUSTERS:
        return {**row, "note": f"no interval: {clusters} prompts"}
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    edge = 1 - NEGLIGIBLE
    z, deviation = np.arctanh(np.clip(value, -edge, edge)), np.arctanh(np.clip(known, -edge, edge)).std(ddof=1)
    p = 2 * student.sf(abs(z) / deviation, clusters - 1) if deviation > 0 else float(z == 0)
    return {**row, "low": float(low), "high": float(high), "p": float(p)}


def adjust(rows: list[Row]) -> list[Row]:
    """Return the rows with ``q`` after ``p``: the false discovery rate over all rows.

    It is not stricter for a family that repeats one hypothesis, as the allocations of a baseline do; Holm's correction
    would be.

    Source: Benjamini and Hochberg 1995.
    """
    known = [row["p"] for row in rows if row["p"] is not None]
    adjusted = iter(false_discovery_control(known).tolist() if known else [])
    result = []
    for row in rows:
        q = None if row["p"] is None else next(adjusted)
        head = {name: row[name] for name in row if name not in ("n", "clusters", "note")}
        result.append({**head, "q": q, **{name: row[name] for name in ("n", "clusters", "note")}})
    return result
