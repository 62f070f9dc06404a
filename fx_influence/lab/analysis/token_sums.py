"""Sums of token influence: how concentrated they are, and their split by sign of advantage, probability and source."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fx_influence.lab.analysis.correlation import CONFIDENCE, Row, cluster_counts, cluster_index
from fx_influence.lab.analysis.covariates import Tokens

FRACTIONS = (0.0002, 0.002, 0.02, 0.2, 0.5)


class Concentration(NamedTuple):
    """Shares of the k tokens with the largest |delta_it|, for k = 1..m; (m,) each.

    ``absolute``: of sum |delta|. ``raising``, ``lowering``: of the sum of all positive, of all negative delta.
    ``net``: their signed sum, nats per unit lr; its last entry sums all tokens. NaN where the denominator is 0.
    """

    absolute: np.ndarray
    raising: np.ndarray
    lowering: np.ndarray
    net: np.ndarray


def concentration(influence: np.ndarray) -> Concentration:
    """Return the shares of the influence in the strongest tokens; ``influence``: (m,), nats per unit lr.

    Example:
        >>> concentration(np.array([1.0, -4.0, 3.0])).absolute.tolist()
        [0.5, 0.875, 1.0]
    """
    ordered = influence[np.argsort(-np.abs(influence), kind="stable")]
    absolute, raising, lowering = (
        np.cumsum(values) for values in (np.abs(ordered), ordered.clip(min=0), -ordered.clip(max=0))
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = [values / values[-1] for values in (absolute, raising, lowering)]
    return Concentration(shares[0], shares[1], shares[2], np.cumsum(ordered))


def concentration_rows(influence: np.ndarray) -> list[Row]:
    """Return ``concentration`` at ``FRACTIONS`` of the tokens, at least one; ``net_share`` is of the sum of all delta.

    The net sum is a small difference of large terms, so that its share may lie outside 0 to 1.
    """
    curves, rows = concentration(influence), []
    for fraction in FRACTIONS:
        k = math.ceil(fraction * len(influence))
        row: Row = {"fraction": fraction, "tokens": k, "of": len(influence)}
        shares = {
            f"{name}_share": _none_if_nan(getattr(curves, name)[k - 1]) for name in ("absolute", "raising", "lowering")
        }
        net, total = float(curves.net[k - 1]), float(curves.net[-1])
        rows.append({**row, **shares, "net": net, "net_share": net / total if total else None})
    return rows


def _none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def sign_rows(tokens: Tokens) -> list[Row]:
    """Return sums of influence by sign of advantage and high or low probability, under two definitions of high.

    ``split``: ``expected``, log pi >= -h, more probable than the policy's average of log pi, where by theory the sign
    changes (d entropy / d logit_y = -pi_y (log pi_y + h)); ``median``, log pi at least its median over the tokens.
    ``sum``: nats per unit lr, with ``low`` and ``high`` over the draw of prompts; ``absolute_share``: of sum |delta|;
    ``mean``: per token. A single row with a note where advantage, log pi or entropy was not stored.
    """
    for name in ("advantage", "logprob", "entropy"):
        if isinstance(why := getattr(tokens, name), str):
            return [{**dict.fromkeys(CELL), "note": f"not defined: {name} {why}"}]
    logprob, entropy, advantage = (np.asarray(x) for x in (tokens.logprob, tokens.entropy, tokens.advantage))
    signs = {"positive": advantage > 0, "zero": advantage == 0, "negative": advantage < 0}
    splits = {"expected": logprob >= -entropy, "median": logprob >= np.median(logprob)}
    counts = cluster_counts(cluster_index(tokens.prompt))
    return [
        {"split": split, "advantage": sign, "probability": name, **_cell(tokens, by_sign & by_probability, counts)}
        for split, high in splits.items()
        for sign, by_sign in signs.items()
        for name, by_probability in (("high", high), ("low", ~high))
    ]


def source_rows(tokens: Tokens) -> list[Row]:
    """Return sums of influence by data source, as ``sign_rows``, the largest share of sum |delta| first.

    There are no rows where no source was recorded.
    """
    counts = cluster_counts(cluster_index(tokens.prompt))
    names = sorted(set(tokens.source.tolist()) - {""})
    rows = [
        {"source": name, "rollouts": len(set(tokens.rollout[tokens.source == name].tolist()))}
        | _cell(tokens, tokens.source == name, counts)
        for name in names
    ]
    return sorted(rows, key=lambda row: -(row["absolute_share"] or 0.0))


CELL = ("split", "advantage", "probability", "tokens", "sum", "low", "high", "absolute_share", "mean")


def _cell(tokens: Tokens, mask: np.ndarray, counts: np.ndarray) -> Row:
    """Return the figures of the tokens in ``mask`` (m,), with an interval from ``counts`` (resamples, prompts)."""
    masked = np.where(mask, tokens.influence, 0.0)
    absolute, count, total = np.abs(tokens.influence).sum(), int(mask.sum()), float(masked.sum())
    sums = counts @ np.bincount(cluster_index(tokens.prompt), masked)
    low, high = np.quantile(sums, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    single = counts.shape[1] < 2
    return {
        "tokens": count,
        "sum": total,
        "low": None if single else low,
        "high": None if single else high,
        "absolute_share": float(np.abs(masked).sum() / absolute) if absolute else None,
        "mean": total / count if count else None,
        "note": "no interval: a single prompt" if single else "" if count else "no such tokens",
    }
