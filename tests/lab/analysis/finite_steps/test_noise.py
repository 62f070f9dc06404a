"""Signal to noise, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fx_influence.lab.analysis.finite_steps.noise import signal_to_noise

ETA = np.array([1e-5, 1e-4])
DELTA = np.array([[1e-6, -2e-6, 0.0, 4e-6], [1e-5, -2e-5, 0.0, 4e-5]])


def test_signal_to_noise_takes_medians_over_nonzero_rollouts() -> None:
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


def test_signal_to_noise_is_none_without_error_or_floor() -> None:
    undefined = signal_to_noise(ETA, DELTA, np.full_like(DELTA, np.nan), 0.0)
    assert [record["sampling_median"] for record in undefined] == [None, None]
    assert [record["sampling_above_2"] for record in undefined] == [None, None]
    assert [record["rounding_median"] for record in undefined] == [None, None]
    constant = signal_to_noise(ETA, 0 * DELTA, 0 * DELTA, 1e-7, 0 * DELTA)
    assert [record["sampling_above_2"] for record in constant] == [None, None]
