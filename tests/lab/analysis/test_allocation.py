"""Allocations of the baseline to rollouts, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fx_influence.lab.analysis.allocation import ALLOCATIONS, allocate, allocation_correlations

INFLUENCE, NORMS = np.array([3.0, -1.0, 0.0, 2.0]), np.array([1.0, 2.0, 0.0, 5.0])


def test_allocate_distributes_the_whole_baseline() -> None:
    for name in ALLOCATIONS[1:]:
        allocated = allocate(INFLUENCE, -8.0, NORMS, name) - INFLUENCE
        assert allocated.sum() == pytest.approx(-8.0)
        assert np.all(allocated <= 0)
    np.testing.assert_allclose(allocate(INFLUENCE, -8.0, NORMS, "none"), INFLUENCE)
    np.testing.assert_allclose(allocate(INFLUENCE, -8.0, NORMS, "grad_norm"), INFLUENCE - NORMS)
    np.testing.assert_allclose(allocate(INFLUENCE, -6.0, NORMS, "abs_influence"), INFLUENCE - np.abs(INFLUENCE))
    np.testing.assert_allclose(allocate(0 * INFLUENCE, -8.0, 0 * NORMS, "grad_norm"), np.full(4, -2.0))
    with pytest.raises(
        ValueError, match="allocation is 'fair'; expected one of none, uniform, grad_norm, abs_influence"
    ):
        allocate(INFLUENCE, 1.0, NORMS, "fair")  # type: ignore[arg-type]


def records(**columns: list[Any]) -> list[dict[str, Any]]:
    columns = {"gradient_norm": NORMS.tolist(), **columns}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def test_allocation_by_norm_can_flip_a_correlation() -> None:
    correlations = allocation_correlations(records(completion_length=[5, 3, 2, 9]), INFLUENCE, -100.0)[
        "completion_length"
    ]
    assert correlations["uniform"]["spearman"] == correlations["none"]["spearman"] == pytest.approx(0.6)
    assert correlations["uniform"]["pearson"] == pytest.approx(correlations["none"]["pearson"])
    assert correlations["grad_norm"]["spearman"] == pytest.approx(-0.8)


def test_allocation_correlations_skip_constant_or_missing() -> None:
    correlations = allocation_correlations(records(advantage=[1.0] * 4, reward=[None, 1.0, 0.0, 1.0]), INFLUENCE, -1.0)
    assert set(correlations) == {"advantage", "gradient_norm"}
    assert correlations["advantage"]["none"] == {"pearson": None, "spearman": None}
