"""Sums of token influence: how concentrated they are, and their split by sign of advantage and probability."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fx_influence.lab.analysis.correlation import (
    CONFIDENCE,
    Row,
    cluster_counts,
    cluster_index,
)
from fx_influence.lab.analysis.covariates import Tokens

FRACTIONS = (0.0002, 0.002, 0.02, 0.2, 0.5)


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
    counts = cluster_counts(cluster_index(tokens.prompt))
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
    sums = counts @ np.bincount(cluster_index(tokens.prompt), part)
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
