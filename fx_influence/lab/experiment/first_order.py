"""Compute the first-order effects of the step and its rollouts on the entropy over one E, task by task."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fx_influence.attribution.influence import influence
from fx_influence.attribution.result import Influence
from fx_influence.lab.experiment.finite_steps import Arrays
from fx_influence.lab.experiment.rounding import rounding_floor
from fx_influence.lab.experiment.step import Step, step_directions
from fx_influence.lab.inputs.rollouts import Progress, ScoredRollouts
from fx_influence.lab.inputs.training_state import TrainingState
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.objectives import expected_reward
from fx_influence.perturbation import jvp_delta
from fx_influence.types import Params

FIRST_ORDER_FIGURES = ("total", "baseline", "momentum", "weight_decay", "residual", "unattributed", "conditioning")
FIRST_ORDER_ARRAYS = ("per_sequence", "per_token", "stderr", "rounding", "deviations")
OTHER_INFLUENCES = (
    "per_sequence_rmsprop",
    "per_sequence_reward",
    "per_sequence_reward_stderr",
    "reward_baseline",
    "reward_total_stderr",
    "reward_degrees_of_freedom",
)
"""Influences along the RMSProp-style direction, and on E's expected reward per unit lr, where every rollout of E has a
reward."""


def first_order(
    plan: EntropyInfluencePlan,
    state: TrainingState,
    step: Step,
    e: ScoredRollouts,
    stored: MutableMapping[int, Arrays] | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Arrays:
    """Return the influences with their matrix, and the plan's other first-order figures, by name.

    Args:
        plan: says what is computed.
        state: the training state.
        step: the step that U makes.
        e: the rollouts of E, scored.
        stored: results of the tasks that are done, by number, see ``sweep``.
        progress: called as tasks are done.

    Returns:
        The fields of ``Influence`` with the matrix. ``d_first`` and ``d_second``: derivatives along directions of the
        whole step, the first of ``full``, ``baseline`` and those of ``plan.directions``, the second of
        ``plan.second_order`` (NaN for the rest). ``full_error``, ``baseline_error``, ``rollouts_error``: standard
        errors of the totals. ``rounding_floor`` where there are finite steps, else NaN. The influences on the reward;
        those along ``rmsprop`` if they cost nothing or it is one of the plan's directions.
    """
    wanted = {"full", "baseline", *plan.directions, *plan.second_order_directions()}
    directions = step_directions(plan, state, step, wanted)
    multiple = rmsprop_multiple(plan, state, step)
    tasks: list[Callable[[], dict[str, Tensor]]] = [
        partial(_entropy_influences, plan, state, step, e),
        *(partial(_direction_derivatives, plan, state, e, name, v) for name, v in directions.items()),
    ]
    if plan.reward_influence:
        tasks.append(partial(_reward_influences, plan, state, step, e))
    if plan.directions:
        tasks.append(partial(_rounding_floor, plan, state, e))
    if "rmsprop" in plan.directions and multiple is None:
        tasks.append(partial(_rmsprop_influences, plan, state, step, e))
    results = state.job.map_tasks(
        [partial(_as_arrays, task) for task in tasks], stored, lambda done: progress("first order", done, len(tasks))
    )
    arrays = {"rounding_floor": np.array(np.nan)} | {name: x for result in results for name, x in result.items()}
    if multiple is not None:
        arrays["per_sequence_rmsprop"] = multiple * arrays["per_sequence"]
    return arrays


def rmsprop_multiple(plan: EntropyInfluencePlan, state: TrainingState, step: Step) -> float | None:
    """Return the ratio of influences along ``rmsprop`` to those of the ``frozen`` preconditioner.

    Both diagonals are -rho / den but for the factor B1 / (kappa (1 - beta1)). None where it differs from parameter to
    parameter, or the plan's preconditioner is another.

    Args:
        plan: has the preconditioner.
        state: has beta1 and the number of steps of every parameter.
        step: has the clipping factor kappa.
    """
    hyper, steps, clip = state.opt_state.hyper, state.opt_state.step, float(step.decomposition.clip)
    factors = {(1 - h.beta1 ** (steps[name] + 1)) / (1 - h.beta1) for name, h in hyper.items() if name in steps}
    return factors.pop() / clip if plan.preconditioner == "frozen" and len(factors) == 1 and clip else None


def _as_arrays(task: Callable[[], dict[str, Tensor]]) -> Arrays:
    return {name: value.cpu().numpy() for name, value in task().items()}


def _entropy_influences(
    plan: EntropyInfluencePlan, state: TrainingState, step: Step, e: ScoredRollouts
) -> dict[str, Tensor]:
    out = _influence(plan, state, step, e, matrix=True)
    assert out.matrix is not None
    names = (*FIRST_ORDER_ARRAYS, *FIRST_ORDER_FIGURES, "matrix")
    tensors = {name: getattr(out, name) for name in names if name != "deviations"}
    assert out.deviations is not None
    tensors["deviations"] = out.deviations.by_part
    tensors["rollouts_error"] = out.deviations.stderr_of_sums(torch.zeros_like(out.deviations.left_out), 1)[0]
    return tensors | {"per_parameter": torch.stack(list(out.per_parameter.values()))}


def _direction_derivatives(
    plan: EntropyInfluencePlan, state: TrainingState, e: ScoredRollouts, name: str, v: Params
) -> dict[str, Tensor]:
    """Return dH/deta and d2H/deta2 along a direction of the whole step, and the error of the first where needed."""
    if not any(x.any() for x in v.values()):
        zero = torch.zeros((), dtype=torch.float64)
        return {f"{name}_first": zero, f"{name}_second": zero, f"{name}_error": zero}
    second = name in plan.second_order_directions()
    delta = jvp_delta(state.params, v, e.batch, apply=state.apply, second_order=second, **plan.estimation())
    tensors = {f"{name}_first": delta.first, f"{name}_second": delta.second}
    if name in ("full", "baseline"):
        tensors[f"{name}_error"] = delta.stderr
    return tensors


def _rmsprop_influences(
    plan: EntropyInfluencePlan, state: TrainingState, step: Step, e: ScoredRollouts
) -> dict[str, Tensor]:
    out = _influence(plan, state, step, e, preconditioner="rmsprop", per_token=False, stderr=False)
    return {"per_sequence_rmsprop": out.per_sequence}


def _reward_influences(
    plan: EntropyInfluencePlan, state: TrainingState, step: Step, e: ScoredRollouts
) -> dict[str, Tensor]:
    rewards = [r.reward for r in e.rollouts if r.reward is not None]
    if len(rewards) < len(e.rollouts):
        return {}
    objective = expected_reward(torch.tensor(rewards, dtype=torch.float64))
    out = _influence(plan, state, step, e, per_token=False, objective=objective)
    return {
        "per_sequence_reward": out.per_sequence,
        "per_sequence_reward_stderr": out.stderr,
        "reward_baseline": out.baseline,
        "reward_total_stderr": out.total_stderr,
        "reward_degrees_of_freedom": torch.tensor(out.degrees_of_freedom or 0),
    }


def _rounding_floor(plan: EntropyInfluencePlan, state: TrainingState, e: ScoredRollouts) -> dict[str, Tensor]:
    return {"rounding_floor": torch.tensor(rounding_floor(plan, state, e.batch), dtype=torch.float64)}


def _influence(
    plan: EntropyInfluencePlan, state: TrainingState, step: Step, e: ScoredRollouts, **options: Any
) -> Influence:
    defaults = {
        "preconditioner": plan.preconditioner,
        "max_grad_norm": plan.max_grad_norm,
        "grad": step.gradient,
        "memory_budget": plan.memory_budget,
        **plan.estimation(),
    }
    return influence(state.params, step.batch, e.batch, state.opt_state, apply=state.apply, **(defaults | options))
