"""Correlations of the tokens' influence with their recorded properties, and with the covariance proxy."""

from __future__ import annotations

import numpy as np

from fx_influence.lab.analysis.correlation import (
    Column,
    Row,
    adjust,
    cluster_index,
    correlation_rows,
    correlations,
)
from fx_influence.lab.analysis.covariates import Tokens

INTERVAL_TOKENS = 10_000
"""Tokens from which intervals and p-values are computed; of more, a random subset of this size is taken."""


def token_correlations(tokens: Tokens, interval_tokens: int = INTERVAL_TOKENS) -> list[Row]:
    """Return correlations of delta_it with log pi, entropy, position and the covariance proxy.

    With more than ``interval_tokens`` tokens, values are of all tokens and intervals of a fixed random subset, which
    makes them wider than necessary; the note says so. Fields: as ``rollout_correlations``.
    """
    covariates = {
        "logprob": tokens.logprob,
        "entropy": tokens.entropy,
        "position": tokens.position,
        "covariance_proxy": tokens.proxy(),
    }
    return adjust(_sampled_rows({"token": tokens.influence}, covariates, tokens.prompt, interval_tokens))


def proxy_rows(tokens: Tokens) -> list[Row]:
    """Return how well the proxy (log pi - mean)(A - mean) predicts delta: R² of the linear fit, and rank correlation.

    There are rows for tokens, and rows for rollouts, with both summed over a rollout's tokens. Fields: ``of``,
    ``measure`` (``r2``, ``spearman``), and those of ``correlation_rows``. The proxy predicts a fall of the entropy, so
    that rho is negative where it works.
    """
    proxy = tokens.proxy()
    index = np.unique(tokens.rollout, return_inverse=True)[1]
    prompt = tokens.prompt[np.unique(index, return_index=True)[1]]
    by_rollout: Column = proxy if isinstance(proxy, str) else np.bincount(index, proxy)
    rows = []
    for level, influence, values, clusters in (
        ("tokens", tokens.influence, proxy, tokens.prompt),
        ("rollouts", np.bincount(index, tokens.influence), by_rollout, prompt),
    ):
        correlated = _sampled_rows({"delta": influence}, {"covariance_proxy": values}, clusters)
        rows += [{"of": level, **(_r2(row) if row["measure"] == "pearson" else row)} for row in correlated]
    return [{k: v for k, v in row.items() if k not in ("influence", "with")} for row in adjust(rows)]


def _r2(row: Row) -> Row:
    if row["low"] is None:
        return {**row, "measure": "r2", "value": None if row["value"] is None else row["value"] ** 2}
    ends = sorted((row["low"] ** 2, row["high"] ** 2))
    low = 0.0 if row["low"] <= 0 <= row["high"] else ends[0]
    return {**row, "measure": "r2", "value": row["value"] ** 2, "low": low, "high": ends[1]}


def _sampled_rows(
    targets: dict[str, Column],
    covariates: dict[str, Column],
    clusters: np.ndarray,
    interval_tokens: int = INTERVAL_TOKENS,
) -> list[Row]:
    """Return ``correlation_rows`` whose intervals rest on at most ``interval_tokens`` of the (m,) tokens."""
    n = len(clusters)
    if n <= interval_tokens:
        return correlation_rows(targets, covariates, cluster_index(clusters))
    subset = np.sort(np.random.default_rng(0).choice(n, interval_tokens, replace=False))
    rows = correlation_rows(_take(targets, subset), _take(covariates, subset), cluster_index(clusters[subset]))
    defined = {name: values for name, values in (targets | covariates).items() if not isinstance(values, str)}
    sample = correlations(np.stack([np.asarray(values) for values in defined.values()]), np.ones((1, n)))
    index = {name: k for k, name in enumerate(defined)}
    for row in rows:
        if row["value"] is not None:
            value = getattr(sample, row["measure"])[0, index[row["influence"]], index[row["with"]]]
            row |= {"value": float(value), "n": n, "note": f"interval and p from {interval_tokens} of {n} tokens"}
    return rows


def _take(columns: dict[str, Column], index: np.ndarray) -> dict[str, Column]:
    return {name: values if isinstance(values, str) else values[index] for name, values in columns.items()}
