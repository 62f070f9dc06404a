"""How much of each rollout's Delta H is signal: against the draw of E, and against rounding, at each eta."""

from __future__ import annotations

import numpy as np


def signal_to_noise(
    eta: np.ndarray, delta: np.ndarray, stderr: np.ndarray, floor: float, float64: np.ndarray | None = None
) -> list[dict[str, float | None]]:
    """One record for each eta, over the rollouts that move anything; Delta H raw, in nats.

    ``delta``, ``stderr``: (n_eta, n_u), along v_i, the error by the jackknife over E's clusters. ``floor``: |Delta H|
    that rounding the weights makes. ``float64``: the same as ``delta`` computed in float64.

    ``sampling_median``: median of |dH_i| / stderr_i. ``sampling_above_2``: share of the rollouts where that exceeds 2.
    ``rounding_median``: median of |dH_i| / floor. With ``float64`` also ``float64_median``, median of
    |dH64_i| / |dH_i - dH64_i|, and ``float64_wrong_sign``, the share of rollouts whose sign rounding has turned; else
    None.

    Example:
        >>> delta, stderr = np.array([[2e-6, -3e-6]]), np.array([[1e-6, 1e-6]])
        >>> record = signal_to_noise(np.array([1e-4]), delta, stderr, floor=1e-8)[0]
        >>> record["sampling_median"], record["sampling_above_2"], record["float64_median"]
        (2.5, 0.5, None)
    """
    moving = (delta != 0).any(0)
    records: list[dict[str, float | None]] = []
    for k in range(len(eta)):
        size, error = np.abs(delta[k, moving]), stderr[k, moving]
        record: dict[str, float | None] = {
            "eta": float(eta[k]),
            "sampling_median": _median(size, error),
            "sampling_above_2": float((size > 2 * error).mean()) if len(size) and not np.isnan(error).any() else None,
            "rounding_median": _median(size, np.full_like(size, floor)),
            "float64_median": None,
            "float64_wrong_sign": None,
        }
        if float64 is not None and len(size):
            exact = float64[k, moving]
            record["float64_median"] = _median(np.abs(exact), np.abs(delta[k, moving] - exact))
            record["float64_wrong_sign"] = float((exact * delta[k, moving] < 0).mean())
        records.append(record)
    return records


def _median(signal: np.ndarray, noise: np.ndarray) -> float | None:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = signal / noise
    # Both 0 says nothing; a signal without any noise is infinitely clear and stays so in a median.
    known = ratio[~np.isnan(ratio)]
    middle = float(np.median(known)) if len(known) else np.nan
    return middle if np.isfinite(middle) else None
