"""Correlates of the tokens' influence, the covariance proxy, concentration, and the split by sign and probability."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fx_influence.lab.analysis.correlation import (
    CONFIDENCE,
    Column,
    Row,
    adjust,
    cluster_counts,
    correlation_rows,
    correlations,
)
from fx_influence.lab.analysis.covariates import Tokens

FRACTIONS = (0.0002, 0.002, 0.02, 0.2, 0.5)
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
        return correlation_rows(targets, covariates, _renumbered(clusters))
    drawn = np.sort(np.random.default_rng(0).choice(n, INTERVAL_TOKENS, replace=False))
    rows = correlation_rows(_at(targets, drawn), _at(covariates, drawn), _renumbered(clusters[drawn]))
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


def _renumbered(clusters: np.ndarray) -> np.ndarray:
    return np.unique(clusters, return_inverse=True)[1]


class Concentration(NamedTuple):
    """What the k tokens with the largest |delta_it| hold, for k = 1..m; (m,).

    ``absolute``: of sum |delta|. ``raising``, ``lowering``: of the sum of all positive, of all negative delta.
    ``net``: their signed sum, nats per unit lr; the last is that of all. NaN where there is nothing to share.
    """

    absolute: np.ndarray
    raising: np.ndarray
    lowering: np.ndarray
    net: np.ndarray


def concentration(influence: np.ndarray) -> Concentration:
    """Curves of the mass in the strongest tokens.

    Example:
        >>> concentration(np.array([1.0, -4.0, 3.0])).absolute.tolist()
        [0.5, 0.875, 1.0]
    """
    ordered = influence[np.argsort(-np.abs(influence), kind="stable")]
    absolute, raising, lowering = (
        np.cumsum(part) for part in (np.abs(ordered), ordered.clip(min=0), -ordered.clip(max=0))
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = [part / part[-1] for part in (absolute, raising, lowering)]
    return Concentration(shares[0], shares[1], shares[2], np.cumsum(ordered))


def concentration_rows(influence: np.ndarray) -> list[Row]:
    """``concentration`` at ``FRACTIONS`` of the tokens, at least one token; ``net_share``: of the sum of all delta.

    The net sum is a small difference of large terms, so that its share may lie outside 0 to 1.
    """
    curves, rows = concentration(influence), []
    for fraction in FRACTIONS:
        k = math.ceil(fraction * len(influence))
        row: Row = {"fraction": fraction, "tokens": k, "of": len(influence)}
        shares = {f"{name}_share": _known(getattr(curves, name)[k - 1]) for name in ("absolute", "raising", "lowering")}
        net, total = float(curves.net[k - 1]), float(curves.net[-1])
        rows.append({**row, **shares, "net": net, "net_share": net / total if total else None})
    return rows


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def sign_rows(tokens: Tokens) -> list[Row]:
    """The influence by sign of advantage and high or low probability, under two meanings of high.

    ``split``: ``expected``, log pi >= -h, more probable than the policy's own average of log pi, where theory has the
    sign turn (d entropy / d logit_y = -pi_y (log pi_y + h)); ``median``, log pi at least its median over the tokens.
    ``sum``: nats per unit lr, with ``low`` and ``high`` over the draw of prompts; ``absolute_share``: of sum |delta|;
    ``mean``: per token. A single row with a note where advantage, log pi or entropy was not stored.
    """
    for name in ("advantage", "logprob", "entropy"):
        if isinstance(why := getattr(tokens, name), str):
            return [{**dict.fromkeys(CELL), "note": f"not defined: {name} {why}"}]
    logprob, entropy, advantage = (np.asarray(x) for x in (tokens.logprob, tokens.entropy, tokens.advantage))
    signs = {"positive": advantage > 0, "zero": advantage == 0, "negative": advantage < 0}
    splits = {"expected": logprob >= -entropy, "median": logprob >= np.median(logprob)}
    counts = cluster_counts(_renumbered(tokens.prompt))
    return [
        {"split": split, "advantage": sign, "probability": name, **_cell(tokens, chosen & which, counts)}
        for split, high in splits.items()
        for sign, chosen in signs.items()
        for name, which in (("high", high), ("low", ~high))
    ]


CELL = ("split", "advantage", "probability", "tokens", "sum", "low", "high", "absolute_share", "mean")


def _cell(tokens: Tokens, chosen: np.ndarray, counts: np.ndarray) -> Row:
    part = np.where(chosen, tokens.influence, 0.0)
    size, count, total = np.abs(tokens.influence).sum(), int(chosen.sum()), float(part.sum())
    sums = counts @ np.bincount(_renumbered(tokens.prompt), part)
    low, high = np.quantile(sums, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    single = counts.shape[1] < 2
    return {
        "tokens": count,
        "sum": total,
        "low": None if single else low,
        "high": None if single else high,
        "absolute_share": float(np.abs(part).sum() / size) if size else None,
        "mean": total / count if count else None,
        "note": "no interval: a single prompt" if single else "" if count else "no such tokens",
    }
