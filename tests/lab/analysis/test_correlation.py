"""Correlations, their intervals and their corrections against scipy and explicit resampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.tolerances import rounding_bound
from scipy import stats

from fx_influence.lab.analysis.correlation import (
    adjust,
    bootstrap,
    cluster_counts,
    correlation_rows,
    correlations,
    partial,
)

RNG = np.random.default_rng(5)
# Correlations are sums over at most some hundred values, which are centred and ranked by sums as long.
ROUNDING = rounding_bound(torch.float64, 1000)
TIED = np.round(RNG.standard_normal((3, 40)), 1)


def row_of(rows: list[dict], **wanted: object) -> dict:
    [row] = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return row


def test_correlations_match_scipy_with_ties() -> None:
    result = correlations(TIED, np.ones((1, 40)))
    for i, j in ((0, 1), (1, 2), (2, 0)):
        assert result.pearson[0, i, j] == pytest.approx(stats.pearsonr(TIED[i], TIED[j]).statistic, abs=ROUNDING)
        assert result.spearman[0, i, j] == pytest.approx(stats.spearmanr(TIED[i], TIED[j]).statistic, abs=ROUNDING)


def test_bootstrap_repeats_whole_clusters() -> None:
    clusters = np.arange(40) // 4
    counts = cluster_counts(clusters, resamples=7, seed=3)
    assert (counts.sum(1) == 10).all()
    resampled = bootstrap(TIED, clusters, resamples=7, seed=3)
    for b, count in enumerate(counts.astype(int)):
        rows = np.concatenate([np.flatnonzero(clusters == c) for c in range(10) for _ in range(count[c])])
        x, y = TIED[0][rows], TIED[1][rows]
        assert resampled.pearson[b, 0, 1] == pytest.approx(stats.pearsonr(x, y).statistic, abs=ROUNDING)
        assert resampled.spearman[b, 0, 1] == pytest.approx(stats.spearmanr(x, y).statistic, abs=ROUNDING)


def test_correlation_rows_interval_is_the_middle_95_percent() -> None:
    clusters = np.arange(40) // 4
    resampled = bootstrap(TIED, clusters).spearman[:, 0, 1]
    row = correlation_rows({"d": TIED[0]}, {"c": TIED[1]}, clusters)[1]
    assert [row["low"], row["high"]] == pytest.approx(np.percentile(resampled, [2.5, 97.5]))
    z = np.arctanh(row["value"]) / np.arctanh(resampled).std(ddof=1)
    assert row["p"] == pytest.approx(2 * stats.t(9).sf(abs(z)))


def test_bootstrap_does_not_depend_on_block_size() -> None:
    clusters = np.arange(40) // 4
    one_block = bootstrap(TIED, clusters, resamples=30)
    blocks = bootstrap(TIED, clusters, resamples=30, block=7 * 3 * 40)
    np.testing.assert_allclose(blocks.spearman, one_block.spearman, rtol=0, atol=ROUNDING)


def test_partial_matches_correlation_of_residuals() -> None:
    g = RNG.standard_normal(60)
    x, y = 2 * g + RNG.standard_normal(60), -g + RNG.standard_normal(60)
    fits = [stats.linregress(g, v) for v in (x, y)]
    residuals = [v - fit.slope * g for v, fit in zip((x, y), fits, strict=True)]
    matrix = correlations(np.stack([x, y, g]), np.ones((1, 60))).pearson
    expected = stats.pearsonr(*residuals).statistic
    assert partial(matrix, 0, 1, given=2)[0] == pytest.approx(expected, abs=ROUNDING)
    assert abs(expected - matrix[0, 0, 1]) > 0.3


def test_interval_is_unchanged_when_rows_are_copied() -> None:
    """Copies of a row add no information: the cluster interval accounts for it, a p-value by rows does not."""
    x, noise = np.random.default_rng(8).standard_normal((2, 25))
    y = 0.4 * x + noise
    many = np.repeat(np.stack([x, y]), 40, axis=1)
    once = correlation_rows({"d": x}, {"c": y}, np.arange(25))
    copied = correlation_rows({"d": many[0]}, {"c": many[1]}, np.repeat(np.arange(25), 40))
    for a, b in zip(once, copied, strict=True):
        assert [b[name] for name in ("value", "low", "high", "p")] == pytest.approx(
            [a[name] for name in ("value", "low", "high", "p")]
        )
    assert stats.pearsonr(*many).pvalue < 1e-3 < once[0]["p"]


@pytest.mark.slow
def test_intervals_cover_and_p_is_uniform_under_the_null() -> None:
    rng, inside, values = np.random.default_rng(11), 0, []
    for _ in range(150):
        shared = rng.standard_normal((2, 30))
        x, y = np.repeat(shared, 4, axis=1) + rng.standard_normal((2, 120))
        row = correlation_rows({"d": x}, {"c": y}, np.repeat(np.arange(30), 4), measures=("pearson",))[0]
        inside += row["low"] <= 0 <= row["high"]
        values.append(row["p"])
    assert 0.86 < inside / 150 < 0.99
    assert stats.kstest(values, "uniform").pvalue > 1e-3


def test_adjust_matches_scipys_false_discovery_rate() -> None:
    rows = [{"p": p, "n": 9, "clusters": 3, "note": ""} for p in (0.01, None, 0.04, 0.03)]
    assert [row["q"] for row in adjust(rows)] == [pytest.approx(0.03), None, pytest.approx(0.04), pytest.approx(0.04)]


def test_correlation_rows_note_why_a_value_is_undefined() -> None:
    x, clusters = np.arange(8.0), np.arange(8) // 2
    covariates: dict[str, Any] = {
        "advantage": x**2,
        "flat": np.full(8, 2.0),
        "absent": "was not recorded",
        "twice": 2 * x**2,
    }
    rows = correlation_rows({"d": x}, covariates, clusters, "advantage", ("pearson", "partial_pearson"))
    assert {(row["with"], row["measure"]): row["note"] for row in rows if row["value"] is None} == {
        ("advantage", "partial_pearson"): "not defined: advantage is the fixed covariate",
        ("flat", "pearson"): "not defined: flat is constant, 2",
        ("flat", "partial_pearson"): "not defined: flat is constant, 2",
        ("absent", "pearson"): "not defined: absent was not recorded",
        ("absent", "partial_pearson"): "not defined: absent was not recorded",
        ("twice", "partial_pearson"): "not defined: determined by the fixed covariate",
    }
    constant = correlation_rows({"d": np.zeros(8)}, {"c": x}, clusters)
    assert constant[0]["note"] == "not defined: the influence is constant, 0"
    single = correlation_rows({"d": x}, {"c": x**2}, np.zeros(8, dtype=int))
    assert single[0]["value"] > 0.9
    assert single[0]["low"] is None
    assert single[0]["note"] == "no interval: a single prompt"
