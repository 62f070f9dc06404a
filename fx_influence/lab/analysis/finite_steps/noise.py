"""Signal to noise of each rollout's Delta H at each eta, against the draw of E and against rounding."""

from __future__ import annotations

import numpy as np


def signal_to_noise(
    eta: np.ndarray, delta: np.ndarray, stderr: np.ndarray, floor: float, float64: np.ndarray | None = None
) -> list[dict[str, float | None]]:
    """Return one record for each eta, over the rollouts whose Delta H is not 0.

    Args:
        eta: (n_eta,).
        delta: (n_eta, n_u), nats, raw Delta H along v_i.
        stderr: (n_eta, n_u), nats, its standard error by the jackknife over E's clusters.
        floor: nats, |Delta H| caused by rounding the weights.
        float64: the same as ``delta``, computed in float64.

    Returns:
        ``eta``; ``sampling_median``, median of |dH_i| / stderr_i; ``sampling_above_2``, share of rollouts where that
        exceeds 2; ``rounding_median``, median of |dH_i| / floor; with ``float64`` also ``float64_median``, median of
        |dH64_i| / |dH_i - dH64_i|, and ``float64_wrong_sign``, share of rollouts whose sign rounding has changed.
        None where a figure is not defined.

    Example:
        >>> delta, stderr = np.array([[2e-6, -3e-6]]), np.array([[1e-6, 1e-6]])
        >>> record = signal_to_noise(np.array([1e-4]), delta, stderr, floor=1e-8)[0]
        >>> record["sampling_median"], record["sampling_above_2"], record["float64_median"]
        (2.5, 0.5, None)
    """
    moving = (delta != 0).any(0)
    records: list[dict[str, float | None]] = []
    for k in range(len(eta)):
        signal, error = np.abs(delta[k, moving]), stderr[k, moving]
        record: dict[str, float | None] = {
            "eta": float(eta[k]),
            "sampling_median": _median(signal, error),
            "sampling_above_2": float((signal > 2 * error).mean())
            if len(signal) and not np.isnan(error).any()
            else None,
            "rounding_median": _median(signal, np.full_like(signal, floor)),
            "float64_median": None,
            "float64_wrong_sign": None,
        }
        if float64 is not None and len(signal):
            exact = float64[k, moving]
            record["float64_median"] = _median(np.abs(exact), np.abs(delta[k, moving] - exact))
            record["float64_wrong_sign"] = float((exact * delta[k, moving] < 0).mean())
        records.append(record)
    return records


def _median(signal: np.ndarray, noise: np.ndarray) -> float | None:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = signal / noise
    # 0 / 0 is not a ratio; a signal without noise is infinite and counts as such in the median.
    defined = ratio[~np.isnan(ratio)]
    median = float(np.median(defined)) if len(defined) else np.nan
    return median if np.isfinite(median) else None
