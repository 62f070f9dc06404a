"""What is measured on one E: the first order of the step and of its rollouts, beside finite steps."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from fx_influence.attribution.influence import influence
from fx_influence.attribution.result import Influence
from fx_influence.estimators.entropy import denominator_weights, entropy_estimate
from fx_influence.estimators.stderr import cluster_index, cluster_stderr
from fx_influence.lab.analysis.finite_steps.figures import finite_figures, rollout_fits
from fx_influence.lab.analysis.finite_steps.linearity import eta_trust
from fx_influence.lab.experiment.finite_steps import Arrays, Steps, sweep
from fx_influence.lab.experiment.rounding import LARGEST_MULTIPLE, clearing_etas, rounding_floor
from fx_influence.lab.experiment.step import Step, step_directions
from fx_influence.lab.inputs.rollouts import Progress, ScoredRollouts
from fx_influence.lab.inputs.training_state import TrainingState, reference_lr
from fx_influence.lab.inputs.update import mean_reward
from fx_influence.lab.plan import STEP_DIRECTIONS, EntropyInfluencePlan
from fx_influence.objectives import expected_reward
from fx_influence.perturbation import jvp_delta
from fx_influence.types import Batch, Params

FIRST_ORDER_FIGURES = ("total", "baseline", "momentum", "weight_decay", "residual", "unattributed", "conditioning")
FIRST_ORDER_ARRAYS = ("per_sequence", "per_token", "stderr", "rounding")
OTHER_INFLUENCES = (
    "per_sequence_rmsprop",
    "per_sequence_reward",
    "per_sequence_reward_stderr",
    "reward_baseline",
    "reward_total_stderr",
)
"""Of the RMSProp-style direction, and on E's expected reward per unit lr; the latter only where all of E is judged."""


class Evaluation(NamedTuple):
    """One E: M (n_e, n_u), the arrays of ``eval_00.npz``, and its entry in ``summary.json``."""

    matrix: np.ndarray
    arrays: Arrays
    summary: dict[str, Any]


def evaluate(
    plan: EntropyInfluencePlan,
    state: TrainingState,
    step: Step,
    e: ScoredRollouts,
    first: Arrays,
    kept: MutableMapping[int, Arrays],
    progress: Progress,
) -> Evaluation:
    """Influences of U on the entropy over ``e``: to first order, and by importance sampling at finite steps.

    ``first``: what ``first_order`` gives. ``kept``: the blocks of the sweep that are done, see ``sweep``.
    """
    lr = reference_lr(state)
    steps = Steps([multiple * lr for multiple in (*plan.eta_multiples, *plan.scaled_eta_multiples)], None)
    floor = float(first["rounding_floor"])
    arrays = {name: first[name] for name in FIRST_ORDER_ARRAYS} | {"eta": np.array(steps.etas)}
    arrays |= {name: first[name] for name in OTHER_INFLUENCES if name in first}
    arrays |= {name: first[name] for d in STEP_DIRECTIONS for name in (f"{d}_first", f"{d}_second") if name in first}
    if plan.auto_scale is not None and "grad" in plan.directions:
        own = clearing_etas(torch.from_numpy(first["per_sequence"]), floor, plan.auto_scale, lr)
        steps = steps._replace(own=own)
    arrays |= sweep(plan, state, step, e.batch, steps, kept, progress)
    if "full" in plan.directions:
        arrays["ess"] = arrays["full_ess"]
    arrays |= rollout_fits(arrays, len(plan.eta_multiples))
    summary = {
        **{name: float(first[name]) for name in FIRST_ORDER_FIGURES},
        **_derived(state, first),
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


def first_order(
    plan: EntropyInfluencePlan,
    state: TrainingState,
    step: Step,
    e: ScoredRollouts,
    kept: MutableMapping[int, Arrays] | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Arrays:
    """Return ``influence`` with its matrix, and what else the plan asks for, by name.

    These are the derivatives along directions of the whole step, the first of ``full``, ``baseline`` and those of
    ``plan.directions``, the second of ``plan.second_order`` (NaN for the rest); the rounding floor where there are
    finite steps, else NaN; the influences on the reward; those along ``rmsprop`` where they cost nothing or it is one
    of the directions.

    ``kept`` holds the parts of this that are done, see ``sweep``.
    """
    asked = {"full", "baseline", *plan.directions, *plan.second_order_directions()}
    whole = step_directions(plan, state, step, asked)
    multiple = rmsprop_multiple(plan, state, step)
    works: list[Callable[[], dict[str, torch.Tensor]]] = [
        partial(_on_entropy, plan, state, step, e),
        *(partial(_slope, plan, state, e, *item) for item in whole.items()),
    ]
    if plan.reward_influence:
        works.append(partial(_on_reward, plan, state, step, e))
    if plan.directions:
        works.append(partial(_rounding_floor, plan, state, e))
    if "rmsprop" in plan.directions and multiple is None:
        works.append(partial(_along_rmsprop, plan, state, step, e))
    arrays = [partial(_arrays, work) for work in works]
    parts = state.job.map_tasks(arrays, kept, lambda done: progress("first order", done, len(works)))
    found = {"rounding_floor": np.array(np.nan)} | {name: value for part in parts for name, value in part.items()}
    if multiple is not None:
        found["per_sequence_rmsprop"] = multiple * found["per_sequence"]
    return found


def rmsprop_multiple(plan: EntropyInfluencePlan, state: TrainingState, step: Step) -> float | None:
    """Return what the influences along ``rmsprop`` are of those of preconditioner ``frozen``: B1 / (kappa (1 - beta1)).

    Both diagonals are -rho / den but for that factor. None where it differs from parameter to parameter, or the plan's
    gain is another.
    """
    hyper, steps, clip = state.opt_state.hyper, state.opt_state.step, float(step.parts.clip)
    factors = {(1 - h.beta1 ** (steps[name] + 1)) / (1 - h.beta1) for name, h in hyper.items() if name in steps}
    return factors.pop() / clip if plan.preconditioner == "frozen" and len(factors) == 1 and clip else None


def _rounding_floor(plan: EntropyInfluencePlan, state: TrainingState, e: ScoredRollouts) -> dict[str, torch.Tensor]:
    return {"rounding_floor": torch.tensor(rounding_floor(plan, state, e.batch), dtype=torch.float64)}


def _arrays(work: Callable[[], dict[str, torch.Tensor]]) -> Arrays:
    return {name: value.cpu().numpy() for name, value in work().items()}


def _on_entropy(
    plan: EntropyInfluencePlan, state: TrainingState, step: Step, e: ScoredRollouts
) -> dict[str, torch.Tensor]:
    out = _influence(plan, state, step, e, preconditioner=plan.preconditioner, matrix=True)
    assert out.matrix is not None
    found = {name: getattr(out, name) for name in (*FIRST_ORDER_ARRAYS, *FIRST_ORDER_FIGURES, "matrix")}
    found["rollouts_error"] = _error(plan, out.matrix.double().sum(1), e.batch)
    return found | {"per_parameter": torch.stack(list(out.per_parameter.values()))}


def _slope(
    plan: EntropyInfluencePlan, state: TrainingState, e: ScoredRollouts, name: str, v: Params
) -> dict[str, torch.Tensor]:
    if not any(x.any() for x in v.values()):
        zero = torch.zeros((), dtype=torch.float64)
        return {f"{name}_first": zero, f"{name}_second": zero, f"{name}_error": zero}
    bent = name in plan.second_order_directions()
    slope = jvp_delta(state.params, v, e.batch, apply=state.apply, second_order=bent, **plan.estimation())
    found = {f"{name}_first": slope.first, f"{name}_second": slope.second}
    if name in ("full", "baseline"):
        found[f"{name}_error"] = _error(plan, slope.contributions, e.batch)
    return found


def _influence(
    plan: EntropyInfluencePlan, state: TrainingState, step: Step, e: ScoredRollouts, **options: Any
) -> Influence:
    return influence(
        state.params,
        step.batch,
        e.batch,
        state.opt_state,
        apply=state.apply,
        max_grad_norm=plan.max_grad_norm,
        grad=step.gradient,
        memory_budget=plan.memory_budget,
        **{**plan.estimation(), **options},
    )


def _along_rmsprop(
    plan: EntropyInfluencePlan, state: TrainingState, step: Step, e: ScoredRollouts
) -> dict[str, torch.Tensor]:
    out = _influence(plan, state, step, e, preconditioner="rmsprop", per_token=False, stderr=False)
    return {"per_sequence_rmsprop": out.per_sequence}


def _on_reward(
    plan: EntropyInfluencePlan, state: TrainingState, step: Step, e: ScoredRollouts
) -> dict[str, torch.Tensor]:
    rewards = [r.reward for r in e.rollouts if r.reward is not None]
    if len(rewards) < len(e.rollouts):
        return {}
    query = expected_reward(torch.tensor(rewards, dtype=torch.float64))
    out = _influence(plan, state, step, e, preconditioner=plan.preconditioner, per_token=False, objective=query)
    found = {"per_sequence_reward": out.per_sequence, "per_sequence_reward_stderr": out.stderr}
    return found | {"reward_baseline": out.baseline, "reward_total_stderr": out.total_stderr}


def _error(plan: EntropyInfluencePlan, contributions: torch.Tensor, batch: Batch) -> torch.Tensor:
    shares = denominator_weights(batch.completion_mask, plan.normalize)
    return cluster_stderr(contributions, contributions.sum(), shares / shares.sum(), cluster_index(batch))


def _derived(state: TrainingState, first: Arrays) -> dict[str, Any]:
    per_sequence, residual = first["per_sequence"], float(first["residual"])
    size = max(np.abs(per_sequence).sum(), abs(per_sequence.sum() + residual))
    return {
        "sum_per_sequence": float(per_sequence.sum()),
        "total_stderr": float(first["full_error"]),
        "baseline_stderr": float(first["baseline_error"]),
        "sum_per_sequence_stderr": float(first["rollouts_error"]),
        "relative_residual": float(abs(residual) / size) if size else 0.0,
        "total_by_jvp": float(first["full_first"]),
        "second_order": float(first["full_second"]),
        "eta_trust": float(eta_trust(first["full_first"], first["full_second"])),
        "rollouts_beyond_two_stderr": None
        if np.isnan(first["stderr"]).all()
        else int((np.abs(per_sequence) > 2 * first["stderr"]).sum()),
        "per_parameter": dict(zip(state.params, first["per_parameter"].tolist(), strict=True)),
    }
