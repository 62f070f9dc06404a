"""Measure one E: influences to first order, finite steps, and the figures of both."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import numpy as np
import torch

from fx_influence.estimators.entropy import entropy_estimate
from fx_influence.estimators.stderr import interval_half_width
from fx_influence.lab.analysis.finite_steps.figures import finite_figures, rollout_fits
from fx_influence.lab.analysis.finite_steps.linearity import eta_trust
from fx_influence.lab.experiment.finite_steps import Arrays, StepSizes, sweep
from fx_influence.lab.experiment.first_order import FIRST_ORDER_ARRAYS, FIRST_ORDER_FIGURES, OTHER_INFLUENCES
from fx_influence.lab.experiment.rounding import LARGEST_MULTIPLE, etas_above_rounding
from fx_influence.lab.experiment.step import Step
from fx_influence.lab.inputs.rollouts import Progress, ScoredRollouts, mean_reward
from fx_influence.lab.inputs.training_state import TrainingState
from fx_influence.lab.plan import STEP_DIRECTIONS, EntropyInfluencePlan


class Evaluation(NamedTuple):
    """Results of a run on one E, as they are stored.

    Attributes:
        matrix: M (n_e, n_u), nats per unit lr.
        arrays: of ``eval_00.npz``.
        summary: its entry in ``summary.json``.
    """

    matrix: np.ndarray
    arrays: Arrays
    summary: dict[str, Any]


def evaluate(
    plan: EntropyInfluencePlan,
    state: TrainingState,
    step: Step,
    e: ScoredRollouts,
    first: Arrays,
    stored: MutableMapping[int, Arrays],
    progress: Progress,
) -> Evaluation:
    """Return the influences of U on the entropy over ``e``: to first order, and by importance sampling.

    Args:
        plan: says what is measured.
        state: the training state.
        step: the step that U makes.
        e: the rollouts of E, scored.
        first: what ``first_order`` returned for this E.
        stored: blocks of finite steps that are already measured, see ``sweep``.
        progress: called as blocks are measured.
    """
    lr = state.reference_lr
    sizes = StepSizes([multiple * lr for multiple in (*plan.eta_multiples, *plan.scaled_eta_multiples)], None)
    floor = float(first["rounding_floor"])
    arrays = {name: first[name] for name in FIRST_ORDER_ARRAYS} | {"eta": np.array(sizes.etas)}
    arrays |= {name: first[name] for name in OTHER_INFLUENCES if name in first}
    arrays |= {name: first[name] for d in STEP_DIRECTIONS for name in (f"{d}_first", f"{d}_second") if name in first}
    if plan.auto_scale is not None and "grad" in plan.directions:
        per_rollout = etas_above_rounding(torch.from_numpy(first["per_sequence"]), floor, plan.auto_scale, lr)
        sizes = sizes._replace(per_rollout=per_rollout)
    arrays |= sweep(plan, state, step, e.batch, sizes, stored, progress)
    if "full" in plan.directions:
        arrays["ess"] = arrays["full_ess"]
    arrays |= rollout_fits(arrays, len(plan.eta_multiples))
    summary = {
        **{name: float(first[name]) for name in FIRST_ORDER_FIGURES},
        **_first_order_summary(state, first),
        "entropy": entropy_estimate(e.values, e.batch, plan.normalize).item(),
        "rollouts": len(e.rollouts),
        "mean_reward": mean_reward(e.rollouts),
        "off_policy": e.off_policy,
        "rounding_floor": floor,
        **finite_figures(arrays, len(plan.eta_multiples), floor),
    }
    if "auto_scale" in summary:
        summary["auto_scale"]["capped"] = int((arrays["auto_eta"] >= LARGEST_MULTIPLE * lr).sum())
    return Evaluation(first["matrix"], arrays, summary)


def _first_order_summary(state: TrainingState, first: Arrays) -> dict[str, Any]:
    per_sequence, residual = first["per_sequence"], float(first["residual"])
    size = max(np.abs(per_sequence).sum(), abs(per_sequence.sum() + residual))
    # With the matrix each cluster of E is a part.
    degrees = len(first["deviations"]) - 1
    return {
        "sum_per_sequence": float(per_sequence.sum()),
        "total_stderr": float(first["full_error"]),
        "baseline_stderr": float(first["baseline_error"]),
        "sum_per_sequence_stderr": float(first["rollouts_error"]),
        "relative_residual": float(abs(residual) / size) if size else 0.0,
        "total_by_jvp": float(first["full_first"]),
        "second_order": float(first["full_second"]),
        "eta_trust": float(eta_trust(first["full_first"], first["full_second"])),
        "degrees_of_freedom": degrees,
        "rollouts_told": None
        if np.isnan(first["stderr"]).all()
        else int((np.abs(per_sequence) > interval_half_width(first["stderr"], degrees)).sum()),
        "per_parameter": dict(zip(state.params, first["per_parameter"].tolist(), strict=True)),
    }
