"""Measures of predictions of a training run's steps: R², correlations and calibration, for sums over steps too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.evidence.bench_prediction import OTHER, SAME, evaluate
from fx_influence.estimators.stderr import degrees_of_sum, interval_half_width

REGRESSED = (1, 10)
"""Lengths of the windows in which predictors are compared."""
BLOCKS = 10
"""Largest number of blocks of consecutive steps that an interval's jackknife leaves out in turn."""
MOMENTUM = 0.9
"""AdamW's first beta."""
TERMS = ("total", "total_stderr", "momentum", "weight_decay", "rollouts")
INFLUENCES = {
    "total": "influences",
    "rollouts": "of them the step's rollouts",
    "momentum": "of them momentum",
    "without_score": "influences without the score term",
}


def measured_rows(steps: Sequence[Mapping[str, Any]], measured: str) -> list[dict[str, Any]]:
    """Return the prediction of each step beside its change on one kind of rollouts, as ``evaluate`` reads them.

    ``stderrs`` and ``degrees`` are those of both.
    """
    rows = []
    for step in steps:
        predicted, change = step["predicted"], step["measured"][measured]
        row = {name: predicted[name] for name in (*TERMS, *(["eta_trust"] if "eta_trust" in predicted else []))}
        row |= {"step": step["step"], "realised": change["delta_h"], "realised_stderr": change["stderr"]}
        row["stderrs"] = [predicted["total_stderr"], change["stderr"]]
        row["degrees"] = [predicted["degrees_of_freedom"], change["degrees_of_freedom"]]
        rows.append(row)
    return rows


def measurement_rows(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return ``measured_rows`` in which the change on fresh rollouts of E's prompts predicts that on other prompts."""
    rows = measured_rows(steps, OTHER)
    for row, step in zip(rows, steps, strict=True):
        same = step["measured"][SAME]
        row |= {"total": same["delta_h"], "total_stderr": same["stderr"]}
        row["stderrs"], row["degrees"] = (
            [same[name], step["measured"][OTHER][name]] for name in ("stderr", "degrees_of_freedom")
        )
    return rows


def averaged_rows(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return ``measured_rows`` on other prompts, predicted by the mean of the prediction and the change on E's prompts.

    That change is to first order what fresh rollouts of E's prompts predict, so it is a prediction from two of each.
    """
    rows = measured_rows(steps, OTHER)
    for row, step in zip(rows, steps, strict=True):
        row["total"] = (row["total"] + step["measured"][SAME]["delta_h"]) / 2
    return rows


def in_windows(rows: Sequence[Mapping[str, Any]], length: int) -> list[dict[str, Any]]:
    """Return the sums of ``measured_rows`` over consecutive windows of ``length`` steps; a shorter rest is left out."""
    windows = [rows[k : k + length] for k in range(0, len(rows) - length + 1, length)]
    return [
        {
            **{name: sum(row[name] for row in window) for name in (*TERMS, "realised")},
            **{name: float(np.hypot.reduce([x[name] for x in window])) for name in ("total_stderr", "realised_stderr")},
            **{name: [x for row in window for x in row[name]] for name in ("stderrs", "degrees")},
        }
        for window in windows
    ]


def coverage(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of errors within the 95% interval of both error bars, by Student's t."""
    errors = np.array([row["realised"] - row["total"] for row in rows])
    widths = [
        interval_half_width(
            float(np.hypot.reduce(row["stderrs"])), degrees_of_sum(np.array(row["stderrs"]), np.array(row["degrees"]))
        )
        for row in rows
    ]
    return float((np.abs(errors) <= widths).mean())


def figures_of(rows: Sequence[Mapping[str, Any]], lr: float) -> dict[str, Any]:
    """Return how good the predictions of rows are, with intervals of R² and the correlation.

    ``expected`` is the R² of a prediction whose errors are as large as both error bars say, and no larger.
    """
    figures = evaluate([dict(row) for row in rows], lr)
    variance = np.var([row["realised"] for row in rows])
    errors = np.mean([np.square(row["stderrs"]).sum() for row in rows])

    def without_block(name: str, chosen: Sequence[int]) -> float:
        return evaluate([dict(rows[k]) for k in chosen], lr)[name]

    return {
        **figures,
        **{name: jackknife(len(rows), partial(without_block, name)) for name in ("r2", "correlation")},
        "count": len(rows),
        "expected": float(1 - errors / variance),
        "covered": coverage(rows),
    }


def jackknife(count: int, figure: Callable[[Sequence[int]], float]) -> dict[str, float]:
    """Return a figure of rows with the half width of its 95% interval, by leaving out blocks of consecutive rows.

    Args:
        count: number of rows.
        figure: function of the indices of rows.

    Source: Künsch, The Jackknife and the Bootstrap for General Stationary Observations, 1989.
    """
    blocks = np.array_split(np.arange(count), min(BLOCKS, count))
    left = [figure([k for k in range(count) if k not in block]) for block in map(set, blocks)]
    stderr = float(np.sqrt((len(left) - 1) * np.var(left)))
    return {"mean": figure(range(count)), "half_width": interval_half_width(stderr, len(left) - 1)}


def averaged(values: np.ndarray) -> np.ndarray:
    """Return the averages over past steps (K,) that AdamW makes of gradients, with its correction of the first."""
    mean, averages = 0.0, []
    for value in values:
        mean = MOMENTUM * mean + (1 - MOMENTUM) * value
        averages.append(mean)
    return np.array(averages) / (1 - MOMENTUM ** np.arange(1, len(averages) + 1))


def predictors(steps: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return every step's prediction (K,) by name: influences, their terms, proxies, and these averaged over steps.

    It is NaN where a step does not have it.
    """
    values = {label: np.array([s["predicted"].get(name, np.nan) for s in steps]) for name, label in INFLUENCES.items()}
    proxies = {name: np.array([s["proxies"][name] for s in steps]) for name in steps[0]["proxies"]}
    return values | proxies | {f"{name}, averaged": averaged(x) for name, x in proxies.items()}


def regression(predicted: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """Return the correlation with its interval, and R² with the slope through 0 that suits these values best."""
    slope = predicted @ measured / (predicted @ predicted)
    residual = ((measured - slope * predicted) ** 2).mean()
    return {
        "correlation": jackknife(
            len(measured), lambda rows: float(np.corrcoef(predicted[list(rows)], measured[list(rows)])[0, 1])
        ),
        "r2": float(1 - residual / measured.var()),
        "slope": float(slope),
    }


def regressions(steps: Sequence[Mapping[str, Any]], chosen: Sequence[int]) -> dict[str, Any]:
    """Return the regressions by kind of rollouts, predictor and number of steps added up.

    Args:
        steps: all steps.
        chosen: consecutive indices of those that are compared; predictors that one of them lacks are left out.
    """
    rows, lengths = list(chosen), [length for length in REGRESSED if len(chosen) // length > 2]
    values = {name: x[rows] for name, x in predictors(steps).items() if np.isfinite(x[rows]).all()}
    changes = {
        measured: np.array([steps[k]["measured"][measured]["delta_h"] for k in rows]) for measured in (SAME, OTHER)
    }
    return {
        measured: {
            name: {str(length): regression(summed(x, length), summed(y, length)) for length in lengths}
            for name, x in values.items()
        }
        for measured, y in changes.items()
    }


def summed(values: np.ndarray, length: int) -> np.ndarray:
    """Return the sums of values (K,) over consecutive windows; a shorter rest is left out."""
    return values[: len(values) // length * length].reshape(-1, length).sum(1)
