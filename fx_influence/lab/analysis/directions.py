"""AdamW's direction beside the RMSProp-style one."""

from __future__ import annotations

import numpy as np

from fx_influence.lab.analysis.correlation import Row, undefined
from fx_influence.lab.results import EntropyInfluenceResults


def direction_rows(results: EntropyInfluenceResults, evaluation: int = 0) -> list[Row]:
    """Return AdamW's direction beside the RMSProp-style one, -g / den: no momentum, no weight decay, no clipping.

    Fields: ``quantity``, ``eta`` (a finite step, raw nats; None: first order, nats per unit lr), ``adamw``,
    ``adamw_stderr``, ``rmsprop``, ``rmsprop_stderr``, ``note``. Where all parameters share beta1 and their step, every
    rollout's influence is the same multiple, (1 - beta1^step) / (clip (1 - beta1)), under AdamW with a
    ``frozen`` preconditioner: the two directions then differ by momentum and decay only. ``multiple`` and ``off the
    multiple`` show how far that holds.
    """
    arrays, summary = results.evaluations[evaluation].arrays, results.evaluations[evaluation].summary
    if "rmsprop_first" not in arrays:
        return [_direction("whole step", note="not defined: the direction was not measured in this run")]
    rows = [
        _direction("whole step", None, float(summary["total"]), float(arrays["rmsprop_first"])),
        _direction("momentum and weight decay", None, float(summary["baseline"]), 0.0),
    ]
    if "per_sequence_rmsprop" in arrays:
        rows += _per_rollout(arrays["per_sequence"], arrays["per_sequence_rmsprop"])
    if "rmsprop" in arrays and "full" in arrays:
        for k, eta in enumerate(arrays["eta"].tolist()):
            row = _direction("whole step", eta, float(arrays["full"][k]), float(arrays["rmsprop"][k]))
            errors = {f"{direction}_stderr": float(arrays[f"{name}_stderr"][k]) for direction, name in DIRECTIONS}
            rows.append(row | errors)
    return rows


DIRECTIONS = (("adamw", "full"), ("rmsprop", "rmsprop"))


def _per_rollout(adamw: np.ndarray, rmsprop: np.ndarray) -> list[Row]:
    rows = [_direction("all rollouts", None, float(adamw.sum()), float(rmsprop.sum()))]
    rows.append(_direction("rollouts that raise the entropy", None, int((adamw > 0).sum()), int((rmsprop > 0).sum())))
    if undefined(adamw) or not adamw.any():
        return [*rows, _direction("multiple", note="not defined: the influences are constant")]
    multiple = float(adamw @ rmsprop / (adamw @ adamw))
    off = float(np.abs(rmsprop - multiple * adamw).max() / np.abs(rmsprop).max())
    return [*rows, _direction("multiple", None, 1.0, multiple), _direction("off the multiple", None, 0.0, off)]


def _direction(
    quantity: str, eta: float | None = None, adamw: float | None = None, rmsprop: float | None = None, note: str = ""
) -> Row:
    values = {"adamw": adamw, "adamw_stderr": None, "rmsprop": rmsprop, "rmsprop_stderr": None}
    return {"quantity": quantity, "eta": eta, **values, "note": note}
