"""Correlates of the tokens' influence, the covariance proxy, concentration, and the split by sign and probability."""

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
"""Tokens that intervals and p-values are made from; of more, this many are drawn."""


def token_correlations(tokens: Tokens) -> list[Row]:
    """delta_it against log pi, entropy, position and the covariance proxy; fields as ``rollout_correlations``.

    With more than ``INTERVAL_TOKENS`` tokens the values are of all, the intervals of that many drawn at random, always
    the same ones; the note says so. They are then wider than they need be.
    """
    covariates = {
        "logprob": tokens.logprob,
        "entropy": tokens.entropy,
        "position": tokens.position,
        "covariance_proxy": tokens.proxy(),
    }
    return adjust(_sampled_rows({"token": tokens.influence}, covariates, tokens.prompt))


def proxy_rows(tokens: Tokens) -> list[Row]:
    """How well the proxy (log pi - mean)(A - mean) tells delta: R² of the line through all, and rank correlation.

    Once for tokens, and once for rollouts, the sums of both over a rollout's tokens. Fields: ``of``, ``measure``
    (``r2``, ``spearman``), and those of ``correlation_rows``. The proxy foretells a fall, so that rho is negative where
    it works.
    """
    proxy = tokens.proxy()
    index = np.unique(tokens.rollout, return_inverse=True)[1]
    prompt = tokens.prompt[np.unique(index, return_index=True)[1]]
    by_rollout: Column = proxy if isinstance(proxy, str) else np.bincount(index, proxy)
    rows = []
    for of, influence, values, clusters in (
        ("tokens", tokens.influence, proxy, tokens.prompt),
        ("rollouts", np.bincount(index, tokens.influence), by_rollout, prompt),
    ):
        found = _sampled_rows({"delta": influence}, {"covariance_proxy": values}, clusters)
        rows += [{"of": of, **(_r2(row) if row["measure"] == "pearson" else row)} for row in found]
    return [{k: v for k, v in row.items() if k not in ("influence", "with")} for row in adjust(rows)]


def _r2(row: Row) -> Row:
    if row["low"] is None:
        return {**row, "measure": "r2", "value": None if row["value"] is None else row["value"] ** 2}
    ends = sorted((row["low"] ** 2, row["high"] ** 2))
    low = 0.0 if row["low"] <= 0 <= row["high"] else ends[0]
    return {**row, "measure": "r2", "value": row["value"] ** 2, "low": low, "high": ends[1]}


def _sampled_rows(targets: dict[str, Column], covariates: dict[str, Column], clusters: np.ndarray) -> list[Row]:
    n = len(clusters)
    if n <= INTERVAL_TOKENS:
        return correlation_rows(targets, covariates, cluster_index(clusters))
    drawn = np.sort(np.random.default_rng(0).choice(n, INTERVAL_TOKENS, replace=False))
    rows = correlation_rows(_at(targets, drawn), _at(covariates, drawn), cluster_index(clusters[drawn]))
    known = {name: values for name, values in (targets | covariates).items() if not isinstance(values, str)}
    whole = correlations(np.stack([np.asarray(values) for values in known.values()]), np.ones((1, n)))
    at = {name: k for k, name in enumerate(known)}
    for row in rows:
        if row["value"] is not None:
            value = getattr(whole, row["measure"])[0, at[row["influence"]], at[row["with"]]]
            row |= {"value": float(value), "n": n, "note": f"interval and p from {INTERVAL_TOKENS} of {n} tokens"}
    return rows


def _at(columns: dict[str, Column], drawn: np.ndarray) -> dict[str, Column]:
    return {name: values if isinstance(values, str) else values[drawn] for name, values in columns.items()}
