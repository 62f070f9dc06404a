"""Intervals by Student's t: quantiles from tables, and coverage of sums whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fx_influence.estimators.stderr import cluster_stderr, degrees_of_sum, interval_half_width

DRAWS = 20_000


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (6, 2.447), (7, 2.365), (30, 2.042), (np.inf, 1.960)])
def test_half_width_is_that_of_the_table(degrees: float, quantile: float) -> None:
    """Quantiles of 0.975 in Student's table, to its three decimals."""
    assert interval_half_width(1.0, degrees) == pytest.approx(quantile, abs=5e-4)
    assert interval_half_width(np.array([0.0, 2.0]), np.full(2, degrees)) == pytest.approx([0, 2 * quantile], abs=1e-3)
    assert interval_half_width(torch.tensor([3.0]), degrees).tolist() == pytest.approx([3 * quantile], abs=1.5e-3)


@pytest.mark.parametrize(("stderr", "degrees"), [(np.nan, 6), (1.0, 0), (1.0, np.nan)])
def test_half_width_is_unknown_without_error_or_degrees(stderr: float, degrees: float) -> None:
    assert np.isnan(interval_half_width(stderr, degrees))


def test_degrees_of_sum_are_between_the_smallest_and_their_sum() -> None:
    degrees = np.array([3.0, 6.0, 15.0])
    for errors in np.random.default_rng(0).exponential(size=(100, 3)):
        assert 3 <= degrees_of_sum(errors, degrees) <= 24
    assert degrees_of_sum(np.sqrt(degrees), degrees) == pytest.approx(24), "variances in proportion to the degrees"
    assert degrees_of_sum(np.array([0.0, 1e-100, 0.0]), np.array([np.nan, 6.0, 3.0])) == pytest.approx(6)
    assert degrees_of_sum(np.zeros(3), degrees) == np.inf
    assert np.isnan(degrees_of_sum(np.array([1.0, np.nan, 1.0]), degrees))


@pytest.mark.parametrize(
    ("spread", "sum_is_too_many"),
    [([1.0], False), ([1.0] * 20, False), ([1.0] + [0.1] * 19, True), ([0.7**k for k in range(20)], False)],
    ids=["one step", "equal steps", "one large step", "falling steps"],
)
def test_intervals_of_sums_cover_the_truth(spread: list[float], sum_is_too_many: bool) -> None:
    """Steps are sums over seven independent parts of E, as with eight folds of which one is left out.

    The share of 20,000 draws has a standard deviation of 0.15%; the bounds are more than five of these from what is
    expected. Where one step has most of the error, the sum of the steps' degrees makes intervals too short.
    """
    scale, parts = np.array(spread), 7
    x = torch.tensor(np.random.default_rng(0).standard_normal((parts, DRAWS, len(scale))) * scale)
    stderr = cluster_stderr(x, x.sum(0), torch.full((parts,), 1 / parts), torch.arange(parts)).numpy()
    error, size = np.sqrt(np.square(stderr).sum(-1)), x.sum((0, -1)).abs().numpy()
    degrees = np.full(len(scale), parts - 1.0)
    of_sum = np.array([degrees_of_sum(s, degrees) for s in stderr])
    assert 0.935 < (size <= interval_half_width(error, of_sum)).mean() < 0.97
    assert ((size <= interval_half_width(error, degrees.sum())).mean() < 0.935) == sum_is_too_many


def test_two_standard_errors_of_few_parts_cover_less() -> None:
    x = torch.tensor(np.random.default_rng(0).standard_normal((7, DRAWS)))
    stderr = cluster_stderr(x, x.sum(0), torch.full((7,), 1 / 7), torch.arange(7))
    assert (x.sum(0).abs() <= 2 * stderr).double().mean() < 0.92
