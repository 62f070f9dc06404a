"""Signal to noise and allocation, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fx_influence.lab.analysis.allocation import ALLOCATIONS, allocate, allocation_correlations
from fx_influence.lab.analysis.finite_steps.noise import signal_to_noise

ETA = np.array([1e-5, 1e-4])
DELTA = np.array([[1e-6, -2e-6, 0.0, 4e-6], [1e-5, -2e-5, 0.0, 4e-5]])


def test_each_eta_has_the_medians_over_rollouts_that_move() -> None:
    stderr = np.array([[1e-6, 1e-6, 0.0, 1e-6], [1e-5, 4e-6, 0.0, 1e-5]])
    exact = DELTA + np.array([[1e-7, 4e-6, 0.0, 1e-7], [1e-7, 1e-7, 0.0, 1e-7]])
    near, far = signal_to_noise(ETA, DELTA, stderr, 2e-7, exact)
    assert near == {
        "eta": 1e-5,
        "sampling_median": pytest.approx(2),
        "sampling_above_2": pytest.approx(1 / 3),
        "rounding_median": pytest.approx(10),
        "float64_median": pytest.approx(11),
        "float64_wrong_sign": pytest.approx(1 / 3),
    }
    assert far["sampling_median"] == pytest.approx(4)
    assert far["sampling_above_2"] == pytest.approx(2 / 3)
    assert far["float64_wrong_sign"] == 0


def test_without_an_error_bar_or_a_floor_there_is_no_ratio() -> None:
    nothing = signal_to_noise(ETA, DELTA, np.full_like(DELTA, np.nan), 0.0)
    assert [record["sampling_median"] for record in nothing] == [None, None]
    assert [record["sampling_above_2"] for record in nothing] == [None, None]
    assert [record["rounding_median"] for record in nothing] == [None, None]
    still = signal_to_noise(ETA, 0 * DELTA, 0 * DELTA, 1e-7, 0 * DELTA)
    assert [record["sampling_above_2"] for record in still] == [None, None]


INFLUENCE, NORMS = np.array([3.0, -1.0, 0.0, 2.0]), np.array([1.0, 2.0, 0.0, 5.0])


def test_an_allocated_baseline_is_dealt_out_whole() -> None:
    for name in ALLOCATIONS[1:]:
        dealt = allocate(INFLUENCE, -8.0, NORMS, name) - INFLUENCE
        assert dealt.sum() == pytest.approx(-8.0)
        assert np.all(dealt <= 0)
    np.testing.assert_allclose(allocate(INFLUENCE, -8.0, NORMS, "none"), INFLUENCE)
    np.testing.assert_allclose(allocate(INFLUENCE, -8.0, NORMS, "grad_norm"), INFLUENCE - NORMS)
    np.testing.assert_allclose(allocate(INFLUENCE, -6.0, NORMS, "abs_influence"), INFLUENCE - np.abs(INFLUENCE))
    np.testing.assert_allclose(allocate(0 * INFLUENCE, -8.0, 0 * NORMS, "grad_norm"), np.full(4, -2.0))
    with pytest.raises(ValueError, match="allocation is 'fair'; use one of none, uniform, grad_norm, abs_influence"):
        allocate(INFLUENCE, 1.0, NORMS, "fair")  # type: ignore[arg-type]


def records(**columns: list[Any]) -> list[dict[str, Any]]:
    columns = {"gradient_norm": NORMS.tolist(), **columns}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def test_dealing_by_gradient_norm_turns_a_correlation_round_and_dealing_evenly_does_not() -> None:
    found = allocation_correlations(records(completion_length=[5, 3, 2, 9]), INFLUENCE, -100.0)["completion_length"]
    assert found["uniform"]["spearman"] == found["none"]["spearman"] == pytest.approx(0.6)
    assert found["uniform"]["pearson"] == pytest.approx(found["none"]["pearson"])
    assert found["grad_norm"]["spearman"] == pytest.approx(-0.8)


def test_covariates_that_are_constant_or_missing_have_no_correlation() -> None:
    found = allocation_correlations(records(advantage=[1.0] * 4, reward=[None, 1.0, 0.0, 1.0]), INFLUENCE, -1.0)
    assert set(found) == {"advantage", "gradient_norm"}
    assert found["advantage"]["none"] == {"pearson": None, "spearman": None}
